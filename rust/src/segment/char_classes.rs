//! Which characters a pre-tokenizer cannot tell apart.
//!
//! A regular expression without back references reads a text one character at a time and asks only
//! whether the character is in one of the sets that it names. Two texts whose characters are in the
//! same of these sets, one by one, are therefore cut at the same places. The classes here are at
//! least as fine as that, so that an answer about one text holds for all texts of its shape.

use rustc_hash::FxHashMap;
use serde_json::Value;
use tokenizers::tokenizer::pattern::Pattern;
use tokenizers::utils::SysRegex;

use super::PreTokenizer;
use crate::vocab::tokenizer_json::component;

/// The expression of Hugging Face's `ByteLevel`, which its configuration does not spell out.
const BYTE_LEVEL: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// A set of characters that a pre-tokenizer names.
#[derive(Debug)]
enum Atom {
    Set(SysRegex),
    Literal(char),
    Numeric,
    Whitespace,
}

/// Classes of characters, numbered as they are met.
#[derive(Debug)]
pub(crate) struct CharClasses {
    atoms: Vec<Atom>,
    /// By character: its class.
    known: FxHashMap<char, u32>,
    /// By the atoms that hold a character: the class.
    classes: FxHashMap<Vec<bool>, u32>,
    ascii_only: bool,
    replacement: Option<char>,
}

impl CharClasses {
    /// The classes of a pre-tokenizer; `None` where it may look at more than characters.
    pub fn of(cut: &PreTokenizer) -> Option<Self> {
        let (section, keeps_ascii, normalizes, replacement) = cut.parts();
        if normalizes && !keeps_ascii {
            return None;
        }
        let section: Value = serde_json::from_str(section).ok()?;
        let parts = section["pretokenizers"].as_array()?;
        let mut atoms = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            match component(part) {
                "Split" => match (&part["pattern"]["Regex"], &part["pattern"]["String"]) {
                    (Value::String(pattern), _) => push_atoms(pattern, &mut atoms)?,
                    (_, Value::String(text)) => atoms.extend(text.chars().map(Atom::Literal)),
                    _ => return None,
                },
                "Digits" => atoms.push(Atom::Numeric),
                "WhitespaceSplit" => atoms.push(Atom::Whitespace),
                "Whitespace" => push_atoms(r"\w\s", &mut atoms)?,
                "Metaspace" => {
                    atoms.push(Atom::Literal(' '));
                    atoms.extend(part["replacement"].as_str()?.chars().map(Atom::Literal));
                }
                // What comes behind it reads bytes in disguise.
                "ByteLevel" if at + 1 == parts.len() => {
                    if part["use_regex"] != false {
                        push_atoms(BYTE_LEVEL, &mut atoms)?;
                    }
                }
                _ => return None,
            }
        }
        Some(Self {
            atoms,
            known: FxHashMap::default(),
            classes: FxHashMap::default(),
            ascii_only: normalizes,
            replacement,
        })
    }

    /// The class of each character of `text`; `false` where the text may not be cut as it is.
    pub fn shape(&mut self, text: &str, out: &mut Vec<u32>) -> bool {
        out.clear();
        if (self.ascii_only && !text.is_ascii())
            || self.replacement.is_some_and(|c| text.contains(c))
        {
            return false;
        }
        for c in text.chars() {
            let class = match self.known.get(&c) {
                Some(&class) => class,
                None => self.classify(c),
            };
            out.push(class);
        }
        true
    }

    fn classify(&mut self, c: char) -> u32 {
        let in_atoms = self.atoms.iter().map(|atom| atom.holds(c)).collect();
        let next = self.classes.len() as u32;
        let class = *self.classes.entry(in_atoms).or_insert(next);
        self.known.insert(c, class);
        class
    }
}

impl Atom {
    fn holds(&self, c: char) -> bool {
        match self {
            Atom::Set(set) => {
                let mut buffer = [0; 4];
                let text: &str = c.encode_utf8(&mut buffer);
                // What does not match is a gap between matches.
                set.find_matches(text)
                    .is_ok_and(|found| found.iter().any(|&(_, matched)| matched))
            }
            Atom::Literal(literal) => *literal == c,
            Atom::Numeric => c.is_numeric(),
            Atom::Whitespace => c.is_whitespace(),
        }
    }
}

/// The sets of characters that a regular expression names; `None` for one that this does not read.
fn push_atoms(pattern: &str, atoms: &mut Vec<Atom>) -> Option<()> {
    let mut sets: Vec<String> = Vec::new();
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        let size = match c {
            '[' => class_length(rest)?,
            '\\' => escape_length(rest)?,
            '{' => {
                let size = rest.find('}')? + 1;
                let count = &rest[1..size - 1];
                if !count.chars().all(|c| c.is_ascii_digit() || c == ',') {
                    return None;
                }
                rest = &rest[size..];
                continue;
            }
            '(' if rest.starts_with("(?") => {
                let size = group_length(rest)?;
                rest = &rest[size..];
                continue;
            }
            '(' | ')' | '|' | '*' | '+' | '?' | '^' | '$' => {
                rest = &rest[1..];
                continue;
            }
            _ => c.len_utf8(),
        };
        let set = &rest[..size];
        rest = &rest[size..];
        match set {
            r"\b" | r"\B" => sets.push(r"\w".to_owned()),
            r"\A" | r"\z" | r"\Z" | r"\G" => {}
            set => sets.push(set.to_owned()),
        }
    }
    sets.sort_unstable();
    sets.dedup();
    for set in sets {
        // Each with and without regard to case: which of the two counts depends on the group.
        for flags in ["s", "si"] {
            atoms.push(Atom::Set(SysRegex::new(&format!("(?{flags}:{set})")).ok()?));
        }
    }
    Some(())
}

/// The length of a set in brackets, those inside it included.
fn class_length(rest: &str) -> Option<usize> {
    let mut depth = 0;
    let mut escaped = false;
    let mut first = false;
    for (at, c) in rest.char_indices() {
        let opens = std::mem::take(&mut first);
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '[' => {
                depth += 1;
                first = true;
            }
            '^' if opens => first = true,
            // Right behind the opening it is a member.
            ']' if opens => {}
            ']' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
    }
    None
}

/// The length of an escape; `None` for a back reference and for what is not known.
fn escape_length(rest: &str) -> Option<usize> {
    let c = rest[1..].chars().next()?;
    match c {
        'p' | 'P' if rest[2..].starts_with('{') => Some(rest.find('}')? + 1),
        'x' | 'u' if rest[2..].starts_with('{') => Some(rest.find('}')? + 1),
        'p' | 'P' => Some(3),
        'x' => (rest.len() >= 4).then_some(4),
        'u' => (rest.len() >= 6).then_some(6),
        's' | 'S' | 'd' | 'D' | 'w' | 'W' | 'b' | 'B' | 'A' | 'z' | 'Z' | 'G' | 'n' | 'r' | 't'
        | 'v' | 'f' => Some(2),
        _ if c.is_alphanumeric() => None,
        _ => Some(1 + c.len_utf8()),
    }
}

/// The length of what opens a group: `(?:`, a flag, a look around.
fn group_length(rest: &str) -> Option<usize> {
    for open in ["(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>"] {
        if rest.starts_with(open) {
            return Some(open.len());
        }
    }
    let flags = rest[2..].find([':', ')'])?;
    let known = |c: char| matches!(c, 'i' | 's' | 'm' | 'u' | '-');
    rest[2..2 + flags]
        .chars()
        .all(known)
        .then_some(2 + flags + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab::Spelling;

    fn cut(pattern: &str) -> PreTokenizer {
        PreTokenizer::from_pattern(pattern).unwrap().unwrap()
    }

    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    #[test]
    fn texts_of_one_shape_are_cut_at_the_same_places() {
        let chars: Vec<char> = "abzstSTlLKſ'\u{212a}12٣Ⅷ \t\n\r\u{a0}.,!?_-/日éß".chars().collect();
        for pattern in [LLAMA3, BYTE_LEVEL, r"[!\]\-a-c][A-Z]+|\d{2,}|\b\w|x"] {
            let cut = cut(pattern);
            let mut classes = CharClasses::of(&cut).unwrap();
            let mut seen: FxHashMap<Vec<u32>, (String, Vec<usize>)> = FxHashMap::default();
            let mut state = 7u64;
            let mut repeated = 0;
            for _ in 0..4_000 {
                let text: String = (0..4)
                    .map(|_| {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        chars[(state >> 33) as usize % chars.len()]
                    })
                    .collect();
                let mut shape = Vec::new();
                assert!(classes.shape(&text, &mut shape));
                let places: Vec<usize> = cut
                    .cut(&text)
                    .unwrap()
                    .iter()
                    .map(|range| text[..range.start].chars().count())
                    .collect();
                if let Some((other, expected)) = seen.get(&shape) {
                    assert_eq!(&places, expected, "{text:?} and {other:?} under {pattern}");
                    repeated += 1;
                } else {
                    seen.insert(shape, (text, places));
                }
            }
            assert!(repeated > 100, "{repeated} under {pattern}");
        }
    }

    #[test]
    fn letters_are_one_class_where_only_their_kind_counts() {
        let mut classes = CharClasses::of(&cut(LLAMA3)).unwrap();
        let mut shapes = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
        for (text, shape) in ["bonk", "zipu", "bo1k", "bolk"].iter().zip(&mut shapes) {
            assert!(classes.shape(text, shape));
        }
        assert_eq!(shapes[0], shapes[1]);
        assert_ne!(shapes[0], shapes[2]);
        assert_ne!(shapes[0], shapes[3], "'l is one of the contractions");
    }

    #[test]
    fn what_reads_more_than_characters_has_no_classes() {
        assert!(CharClasses::of(&cut(r"(a)b")).is_some());
        assert!(CharClasses::of(&cut(r"(?:a|(?i)b)+?[x-y]{2}")).is_some());
        assert!(push_atoms(r"(a)\1", &mut Vec::new()).is_none());
        assert!(push_atoms(r"(?<name>a)", &mut Vec::new()).is_none());
        assert!(push_atoms(r"\R", &mut Vec::new()).is_none());
        let bert = serde_json::json!({"type": "BertPreTokenizer"});
        let bert = PreTokenizer::from_sections(Some(&bert), None, &Spelling::ByteLevel);
        assert!(CharClasses::of(&bert.unwrap().unwrap()).is_none());
    }

    #[test]
    fn text_that_a_normalizer_may_change_has_no_shape() {
        let split = serde_json::json!({"type": "Digits", "individual_digits": true});
        let normalizer = serde_json::json!({"type": "NFC"});
        let cut =
            PreTokenizer::from_sections(Some(&split), Some(&normalizer), &Spelling::ByteLevel);
        let mut classes = CharClasses::of(&cut.unwrap().unwrap()).unwrap();
        assert!(classes.shape("e1", &mut Vec::new()));
        assert!(!classes.shape("é1", &mut Vec::new()));
    }
}
