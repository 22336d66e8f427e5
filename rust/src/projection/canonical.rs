//! Equality of tokens up to declared differences.

use std::borrow::Cow;

use rustc_hash::FxHashMap;

use super::Canonical;
use crate::tokenizer::Tokenizer;
use crate::vocab::TokenKind;

/// Teacher ids by the canonical form of their bytes.
pub(super) struct CanonicalIndex {
    options: Canonical,
    ids: FxHashMap<Vec<u8>, u32>,
}

impl CanonicalIndex {
    /// `None` where no difference is declared.
    pub(super) fn new(teacher: &Tokenizer, options: Canonical) -> Option<Self> {
        if options == Canonical::default() {
            return None;
        }
        let mut ids = FxHashMap::default();
        for (id, kind) in (0u32..).zip(teacher.vocab.kinds()) {
            if *kind == TokenKind::Normal {
                let form = options.form(teacher.vocab.token_bytes(id));
                // A token that is its own canonical form stands for its class, else the lowest id.
                let own = teacher.id_of(&form);
                ids.entry(form.into_owned()).or_insert(own.unwrap_or(id));
            }
        }
        Some(Self { options, ids })
    }

    pub(super) fn id_of(&self, bytes: &[u8]) -> Option<u32> {
        if bytes.is_empty() {
            return None;
        }
        self.ids.get(self.options.form(bytes).as_ref()).copied()
    }
}

impl Canonical {
    fn form(self, bytes: &[u8]) -> Cow<'_, [u8]> {
        let mut form = Cow::Borrowed(bytes);
        if self.punctuation_space
            && let Some(rest) = bytes.strip_prefix(b" ")
            && !rest.is_empty()
            && rest.iter().all(u8::is_ascii_punctuation)
        {
            form = Cow::Borrowed(rest);
        }
        if self.case
            && let Ok(text) = str::from_utf8(&form)
        {
            form = Cow::Owned(text.to_lowercase().into_bytes());
        }
        form
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_declared_differences_vanish() {
        let space = Canonical {
            punctuation_space: true,
            case: false,
        };
        assert_eq!(space.form(b" ,"), b",".as_slice());
        for same in [b" x".as_slice(), b"_x", b" ", b"\t", b"  ,", b"A"] {
            assert_eq!(space.form(same), same);
        }
        let case = Canonical {
            punctuation_space: false,
            case: true,
        };
        assert_eq!(case.form(" Straße".as_bytes()), " straße".as_bytes());
        assert_eq!(case.form(b" ,"), b" ,".as_slice());
        assert_eq!(case.form(b"\xFF"), b"\xFF".as_slice());
    }
}
