//! A vocabulary as what its tokens contribute to the text: one byte string and one kind an id.

mod holes;
pub mod rank_files;
mod roles;
pub mod spelling;
pub mod tokenizer_json;

use std::fmt::Write as _;
use std::hash::Hasher as _;

use hashbrown::HashTable;
use rustc_hash::FxHasher;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use roles::Role;
pub use spelling::Spelling;
pub use tokenizer_json::TokenizerJson;

use crate::error::{Error, Result, checked_id};

/// What an id is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum TokenKind {
    /// Contributes its bytes to the text.
    Normal = 0,
    /// Contributes one byte, and is emitted only where no normal token spells it (`<0x41>`).
    ByteFallback = 1,
    /// A control token (BOS, EOS, chat markers, padding): contributes nothing.
    Special = 2,
    /// A hole in the ids, or a row that only pads the lm_head.
    Unused = 3,
}

/// Where a tokenizer puts a space of its own before the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum DummyPrefix {
    /// Nowhere: byte-level tokenizers.
    Never = 0,
    /// At the start of the sequence.
    First = 1,
    /// At the start of the sequence and after each special or added token.
    Every = 2,
}

/// The bytes and the kind of each id in `0..len`, with the lookup from bytes to id.
///
/// All token bytes lie in one buffer; token `i` is `bytes[starts[i]..starts[i + 1]]`. Special and
/// unused ids are empty there.
///
/// ```
/// use xtoken::{DummyPrefix, Role, Spelling, VocabBuilder};
///
/// let mut builder = VocabBuilder::new(Spelling::ByteLevel, DummyPrefix::Never);
/// let bos = builder.push_special("<s>")?;
/// let the = builder.push_text(b" the")?;
/// let vocab = builder.build();
/// assert_eq!(vocab.id_of(b" the"), Some(the));
/// assert_eq!(vocab.token_bytes(bos), b"", "a control token contributes no text");
/// assert_eq!(vocab.role(Role::Bos), Some(bos));
/// assert_eq!(vocab.decode_bytes(&[0, 1, 1])?, b" the the");
/// # Ok::<(), xtoken::Error>(())
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Parts", into = "Parts")]
pub struct Vocab {
    parts: Parts,
    /// Ids by bytes: one id for each distinct byte string, the one that the tokenizer would emit.
    index: HashTable<u32>,
    fingerprint: [u8; 32],
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Parts {
    bytes: Vec<u8>,
    starts: Vec<u32>,
    kinds: Vec<TokenKind>,
    /// The text of each special id, in order of ids.
    special_texts: Vec<(u32, String)>,
    /// Ids that are text and are matched before the model sees the text, in order.
    added: Vec<u32>,
    roles: [Option<u32>; Role::ALL.len()],
    /// Declared stop tokens, what a turn ends with first.
    stops: Vec<u32>,
    dummy_prefix: DummyPrefix,
    spelling: Spelling,
}

/// Collects a vocabulary id by id.
#[derive(Debug)]
pub struct VocabBuilder {
    parts: Parts,
}

impl VocabBuilder {
    /// An empty vocabulary of tokens in one spelling.
    #[must_use]
    pub fn new(spelling: Spelling, dummy_prefix: DummyPrefix) -> Self {
        Self {
            parts: Parts {
                bytes: Vec::new(),
                starts: vec![0],
                kinds: Vec::new(),
                special_texts: Vec::new(),
                added: Vec::new(),
                roles: [None; Role::ALL.len()],
                stops: Vec::new(),
                dummy_prefix,
                spelling,
            },
        }
    }

    fn push(&mut self, bytes: &[u8], kind: TokenKind) -> Result<u32> {
        let id = self.parts.kinds.len();
        let end = self.parts.bytes.len() + bytes.len();
        // The sentinel u32::MAX stays free for "no id".
        if id >= u32::MAX as usize || end > u32::MAX as usize {
            return Err(Error::Option {
                name: "tokens",
                value: format!("{id} tokens of {end} bytes together"),
                expected: "fewer than 2^32 of each",
            });
        }
        self.parts.bytes.extend_from_slice(bytes);
        self.parts.starts.push(end as u32);
        self.parts.kinds.push(kind);
        Ok(id as u32)
    }

    /// Appends a token that contributes `bytes`; one without bytes is unused.
    pub fn push_text(&mut self, bytes: &[u8]) -> Result<u32> {
        let kind = if bytes.is_empty() {
            TokenKind::Unused
        } else {
            TokenKind::Normal
        };
        self.push(bytes, kind)
    }

    /// Appends a token that is text, but is matched before the model sees the text, so that what
    /// stands before and behind it is tokenized on its own.
    pub fn push_added(&mut self, bytes: &[u8]) -> Result<u32> {
        let id = self.push_text(bytes)?;
        if !bytes.is_empty() {
            self.parts.added.push(id);
        }
        Ok(id)
    }

    /// Appends a token that stands for one byte where no normal token does.
    pub fn push_byte_fallback(&mut self, byte: u8) -> Result<u32> {
        self.push(&[byte], TokenKind::ByteFallback)
    }

    /// Appends a control token; `text` is how its own files name it.
    pub fn push_special(&mut self, text: &str) -> Result<u32> {
        let id = self.push(&[], TokenKind::Special)?;
        self.parts.special_texts.push((id, text.to_owned()));
        if let Some(role) = Role::guess(text) {
            self.parts.roles[role as usize].get_or_insert(id);
        }
        Ok(id)
    }

    /// Appends an id that no text produces.
    pub fn push_unused(&mut self) -> Result<u32> {
        self.push(&[], TokenKind::Unused)
    }

    /// Number of ids so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.parts.kinds.len()
    }

    /// Whether there is no id yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parts.kinds.is_empty()
    }

    /// The finished vocabulary.
    #[must_use]
    pub fn build(self) -> Vocab {
        Vocab::from_parts(self.parts)
    }
}

/// Two hexadecimal digits per byte.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut digits = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(digits, "{byte:02x}");
    }
    digits
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(bytes);
    hasher.finish()
}

impl Parts {
    fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        &self.bytes[self.starts[id] as usize..self.starts[id + 1] as usize]
    }

    fn digest(&self) -> [u8; 32] {
        let mut sha = Sha256::new();
        sha.update(b"xtoken vocabulary 2\0");
        sha.update((self.kinds.len() as u64).to_le_bytes());
        for start in &self.starts {
            sha.update(start.to_le_bytes());
        }
        sha.update(&self.bytes);
        let kinds: Vec<u8> = self.kinds.iter().map(|&kind| kind as u8).collect();
        sha.update(&kinds);
        for (id, text) in &self.special_texts {
            sha.update(id.to_le_bytes());
            sha.update((text.len() as u64).to_le_bytes());
            sha.update(text.as_bytes());
        }
        sha.finalize().into()
    }
}

impl From<Vocab> for Parts {
    fn from(vocab: Vocab) -> Self {
        vocab.parts
    }
}

impl TryFrom<Parts> for Vocab {
    type Error = Error;

    /// Checks what [`VocabBuilder`] guarantees, as stored bytes may have been altered.
    fn try_from(parts: Parts) -> Result<Self> {
        let size = parts.kinds.len();
        let consistent = parts.starts.len() == size + 1
            && parts.starts.first() == Some(&0)
            && parts.starts.last().map(|&end| end as usize) == Some(parts.bytes.len())
            && parts.starts.is_sorted()
            && parts
                .special_texts
                .iter()
                .all(|&(id, _)| (id as usize) < size)
            && parts.special_texts.is_sorted_by(|a, b| a.0 < b.0)
            && parts.added.last().is_none_or(|&id| (id as usize) < size)
            && parts.added.is_sorted_by(|a, b| a < b)
            && parts.roles.iter().flatten().all(|&id| (id as usize) < size)
            && parts.stops.iter().all(|&id| (id as usize) < size);
        if !consistent {
            return Err(Error::Format {
                what: "stored vocabulary",
                reason: "its offsets, kinds and roles do not fit together".to_owned(),
                remedy: "build it again from the tokenizer",
            });
        }
        Ok(Vocab::from_parts(parts))
    }
}

impl Vocab {
    fn from_parts(parts: Parts) -> Self {
        let mut index: HashTable<u32> = HashTable::with_capacity(parts.kinds.len());
        for id in 0..parts.kinds.len() as u32 {
            let bytes = parts.token_bytes(id);
            if bytes.is_empty() {
                continue;
            }
            let key = hash(bytes);
            match index.find_mut(key, |&other| parts.token_bytes(other) == bytes) {
                // A byte token yields to a normal one; among equals the lowest id stays.
                Some(other) => {
                    if parts.kinds[*other as usize] == TokenKind::ByteFallback
                        && parts.kinds[id as usize] == TokenKind::Normal
                    {
                        *other = id;
                    }
                }
                None => {
                    index.insert_unique(key, id, |&other| hash(parts.token_bytes(other)));
                }
            }
        }
        let fingerprint = parts.digest();
        Self {
            parts,
            index,
            fingerprint,
        }
    }

    /// Number of ids, holes included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.parts.kinds.len()
    }

    /// Whether there is no id at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parts.kinds.is_empty()
    }

    /// The bytes that `id` contributes; empty for special and unused ids and for ids past the end.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        if (id as usize) < self.len() {
            self.parts.token_bytes(id)
        } else {
            &[]
        }
    }

    /// Offsets into [`Vocab::blob`], `len + 1` of them.
    #[must_use]
    pub fn starts(&self) -> &[u32] {
        &self.parts.starts
    }

    /// The bytes of all tokens, one after the other.
    #[must_use]
    pub fn blob(&self) -> &[u8] {
        &self.parts.bytes
    }

    /// The kind of `id`; ids past the end are unused.
    #[must_use]
    pub fn kind(&self, id: u32) -> TokenKind {
        self.parts
            .kinds
            .get(id as usize)
            .copied()
            .unwrap_or(TokenKind::Unused)
    }

    /// The kinds of all ids.
    #[must_use]
    pub fn kinds(&self) -> &[TokenKind] {
        &self.parts.kinds
    }

    /// The id that spells exactly `bytes`. Of several, the one that the tokenizer emits: a normal
    /// token before a byte token, then the lowest id.
    #[must_use]
    pub fn id_of(&self, bytes: &[u8]) -> Option<u32> {
        self.index
            .find(hash(bytes), |&id| self.parts.token_bytes(id) == bytes)
            .copied()
    }

    /// The text of a special id, as its tokenizer names it.
    #[must_use]
    pub fn special_text(&self, id: u32) -> Option<&str> {
        let texts = &self.parts.special_texts;
        let at = texts
            .binary_search_by_key(&id, |&(special, _)| special)
            .ok()?;
        Some(&texts[at].1)
    }

    /// All special ids with their texts, in order of ids.
    pub fn specials(&self) -> impl Iterator<Item = (u32, &str)> {
        self.parts
            .special_texts
            .iter()
            .map(|(id, text)| (*id, text.as_str()))
    }

    /// The ids that are text and are matched before the model sees the text, in order.
    #[must_use]
    pub fn added(&self) -> &[u32] {
        &self.parts.added
    }

    /// Whether `id` is text that is matched before the model sees the text.
    #[must_use]
    pub fn is_added(&self, id: u32) -> bool {
        self.parts.added.binary_search(&id).is_ok()
    }

    /// The id that plays `role`, declared or guessed from its text.
    #[must_use]
    pub fn role(&self, role: Role) -> Option<u32> {
        self.parts.roles[role as usize]
    }

    /// The token for text that the vocabulary lacks, unless it marks a sequence's bounds as well.
    /// It stands within text: what follows it has no dummy prefix.
    #[must_use]
    pub fn unknown(&self) -> Option<u32> {
        let bounds = [Role::Bos, Role::Eos, Role::EndOfTurn].map(|role| self.role(role));
        self.role(Role::Unk)
            .filter(|&id| !bounds.contains(&Some(id)))
    }

    /// Declares the id that plays `role`; `None` clears it.
    ///
    /// # Errors
    /// [`Error::NoSuchId`] where the id is outside the vocabulary.
    pub fn set_role(&mut self, role: Role, id: Option<u32>) -> Result<()> {
        if let Some(id) = id {
            checked_id(i64::from(id), self.len())?;
        }
        self.parts.roles[role as usize] = id;
        Ok(())
    }

    /// All that can stop a sequence, in order of preference: the declared stop tokens, the end of
    /// a turn, the end of a sequence. An id that no text produces stops nothing.
    #[must_use]
    pub fn stops(&self) -> Vec<u32> {
        let roles = [Role::EndOfTurn, Role::Eos].map(|role| self.role(role));
        let mut stops = Vec::new();
        for id in self
            .declared_stops()
            .iter()
            .copied()
            .chain(roles.into_iter().flatten())
        {
            if !stops.contains(&id) && self.kind(id) != TokenKind::Unused {
                stops.push(id);
            }
        }
        stops
    }

    /// The stop tokens that were declared beside the roles.
    #[must_use]
    pub fn declared_stops(&self) -> &[u32] {
        &self.parts.stops
    }

    /// Declares stop tokens, what a turn ends with first, in place of those declared before.
    ///
    /// # Errors
    /// [`Error::NoSuchId`] where an id is outside the vocabulary.
    pub fn set_stops(&mut self, ids: &[i64]) -> Result<()> {
        let mut stops = Vec::with_capacity(ids.len());
        for &id in ids {
            let id = checked_id(id, self.len())?;
            if !stops.contains(&id) {
                stops.push(id);
            }
        }
        self.parts.stops = stops;
        Ok(())
    }

    /// Where the tokenizer puts a space of its own.
    #[must_use]
    pub fn dummy_prefix(&self) -> DummyPrefix {
        self.parts.dummy_prefix
    }

    /// How the tokens are spelled in the tokenizer's files.
    #[must_use]
    pub fn spelling(&self) -> &Spelling {
        &self.parts.spelling
    }

    /// A stable hash of what each id is: bytes, kinds and special texts. 64 hexadecimal digits.
    ///
    /// Roles, stops and the dummy prefix take no part: they differ between a file and what a
    /// library makes of it, where the tokens are the same.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        hex(&self.fingerprint)
    }

    /// The bytes of a sequence of ids, one token after the other, with the dummy prefix of its
    /// first text token left out where this family has one.
    ///
    /// # Errors
    /// [`Error::NoSuchId`] for an id outside the vocabulary.
    pub fn decode_bytes(&self, ids: &[i64]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let mut at_start = self.parts.dummy_prefix != DummyPrefix::Never;
        let unknown = self.unknown();
        for &id in ids {
            let token = checked_id(id, self.len())?;
            let mut bytes = self.parts.token_bytes(token);
            let every = self.parts.dummy_prefix == DummyPrefix::Every;
            if every && self.is_added(token) {
                at_start = true;
            } else if self.kind(token) == TokenKind::Special {
                at_start |= every && Some(token) != unknown;
            } else if at_start && !bytes.is_empty() {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
                at_start = false;
            }
            out.extend_from_slice(bytes);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Vocab {
        let mut builder = VocabBuilder::new(Spelling::sentencepiece(), DummyPrefix::Every);
        builder.push_special("<s>").unwrap();
        builder.push_byte_fallback(b'A').unwrap();
        builder.push_text(b"A").unwrap();
        builder.push_text(b" the").unwrap();
        builder.push_text(b" the").unwrap();
        builder.push_unused().unwrap();
        builder.build()
    }

    #[test]
    fn of_equal_tokens_the_normal_one_with_the_lowest_id_is_found() {
        let vocab = small();
        assert_eq!(vocab.id_of(b"A"), Some(2));
        assert_eq!(vocab.id_of(b" the"), Some(3));
        assert_eq!(vocab.id_of(b""), None);
        assert_eq!(vocab.id_of(b"the"), None);
    }

    #[test]
    fn the_dummy_prefix_is_left_out_at_the_start_and_after_specials() {
        let vocab = small();
        assert_eq!(vocab.decode_bytes(&[0, 3, 3, 0, 3]).unwrap(), b"the thethe");
        assert_eq!(vocab.decode_bytes(&[2, 3]).unwrap(), b"A the");
        assert!(matches!(
            vocab.decode_bytes(&[-1]),
            Err(Error::NoSuchId { id: -1, size: 6 })
        ));
        assert!(vocab.decode_bytes(&[6]).is_err());
    }

    #[test]
    fn the_dummy_prefix_is_left_out_after_added_text_and_not_before_it() {
        let mut builder = VocabBuilder::new(Spelling::sentencepiece(), DummyPrefix::Every);
        builder.push_text(b" the").unwrap();
        builder.push_added(b" <think>").unwrap();
        let vocab = builder.build();
        assert_eq!(vocab.added(), [1]);
        assert_eq!(
            vocab.decode_bytes(&[1, 0, 0, 1, 0]).unwrap(),
            b" <think>the the <think>the"
        );
    }

    #[test]
    fn an_unknown_token_stands_within_text() {
        let mut vocab = small();
        vocab.set_role(Role::Unk, Some(0)).unwrap();
        // A token that begins sequences as well is no text.
        assert_eq!(vocab.unknown(), None);
        vocab.set_role(Role::Bos, None).unwrap();
        assert_eq!(vocab.unknown(), Some(0));
        assert_eq!(vocab.decode_bytes(&[3, 0, 3]).unwrap(), b"the the");
    }

    #[test]
    fn specials_have_roles_by_their_texts_which_can_be_overridden() {
        let mut vocab = small();
        assert_eq!(vocab.role(Role::Bos), Some(0));
        assert_eq!(vocab.special_text(0), Some("<s>"));
        assert_eq!(vocab.special_text(1), None);
        vocab.set_role(Role::Bos, None).unwrap();
        assert_eq!(vocab.role(Role::Bos), None);
        assert!(vocab.set_role(Role::Eos, Some(6)).is_err());
    }

    #[test]
    fn stops_are_the_declared_ones_then_the_end_of_a_turn_then_the_end_of_a_sequence() {
        let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
        for text in ["<|endoftext|>", "<|call|>", "<|end|>", "<|return|>"] {
            builder.push_special(text).unwrap();
        }
        let mut vocab = builder.build();
        let fingerprint = vocab.fingerprint();
        assert_eq!(vocab.stops(), [2, 0]);
        vocab.set_stops(&[3, 1, 0, 3]).unwrap();
        assert_eq!(vocab.stops(), [3, 1, 0, 2]);
        assert_eq!(vocab.declared_stops(), [3, 1, 0]);
        assert_eq!(vocab.fingerprint(), fingerprint);
        let stored = serde_json::to_string(&vocab).unwrap();
        let back: Vocab = serde_json::from_str(&stored).unwrap();
        assert_eq!(back.stops(), vocab.stops());
        let altered = stored.replacen("\"stops\":[3", "\"stops\":[9", 1);
        assert!(serde_json::from_str::<Vocab>(&altered).is_err());
        assert!(matches!(
            vocab.set_stops(&[4]),
            Err(Error::NoSuchId { id: 4, size: 4 })
        ));
        vocab.set_stops(&[]).unwrap();
        assert_eq!(vocab.stops(), [2, 0]);
    }

    #[test]
    fn the_fingerprint_sees_bytes_kinds_and_specials() {
        let one = small();
        assert_eq!(one.fingerprint(), small().fingerprint());
        assert_eq!(one.fingerprint().len(), 64);
        let mut builder = VocabBuilder::new(Spelling::sentencepiece(), DummyPrefix::Every);
        builder.push_special("<t>").unwrap();
        builder.push_byte_fallback(b'A').unwrap();
        builder.push_text(b"A").unwrap();
        builder.push_text(b" the").unwrap();
        builder.push_text(b" the").unwrap();
        builder.push_unused().unwrap();
        assert_ne!(one.fingerprint(), builder.build().fingerprint());
    }

    #[test]
    fn a_stored_vocabulary_is_checked_when_it_is_read() {
        let vocab = small();
        let stored = serde_json::to_string(&vocab).unwrap();
        let back: Vocab = serde_json::from_str(&stored).unwrap();
        assert_eq!(back.fingerprint(), vocab.fingerprint());
        let altered = stored.replacen("\"starts\":[0,0,1", "\"starts\":[0,9,1", 1);
        assert_ne!(altered, stored);
        assert!(serde_json::from_str::<Vocab>(&altered).is_err());
    }
}
