//! Which characters a pre-tokenizer cannot tell apart.
//!
//! A regular expression without back references reads a text one character at a time and asks only
//! whether the character is in one of the sets that it names. Two texts whose characters are in the
//! same of these sets, one by one, are therefore cut at the same places. The classes here are at
//! least as fine as that, so that an answer about one text holds for all texts of its shape.

use std::collections::BTreeSet;

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
///
/// Letters that a pattern names one by one, as in `'s|'t|'re`, count only behind the character that
/// such a branch begins with, its guard. In a text without guards they are letters as others are.
#[derive(Debug)]
pub(crate) struct CharClasses {
    atoms: Vec<Atom>,
    /// Those that count only behind a guard.
    guarded: Vec<Atom>,
    guards: Vec<char>,
    /// By character: its class in a text without guards, and in one with.
    known: [FxHashMap<char, u32>; 2],
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
        let mut made = Self {
            atoms: Vec::new(),
            guarded: Vec::new(),
            guards: Vec::new(),
            known: Default::default(),
            classes: FxHashMap::default(),
            ascii_only: normalizes,
            replacement,
        };
        for (at, part) in parts.iter().enumerate() {
            match component(part) {
                "Split" => match (&part["pattern"]["Regex"], &part["pattern"]["String"]) {
                    (Value::String(pattern), _) => made.push_pattern(pattern)?,
                    (_, Value::String(text)) => {
                        made.atoms.extend(text.chars().map(Atom::Literal));
                    }
                    _ => return None,
                },
                "Digits" => made.atoms.push(Atom::Numeric),
                "WhitespaceSplit" => made.atoms.push(Atom::Whitespace),
                "Whitespace" => made.push_pattern(r"\w\s")?,
                "Metaspace" => {
                    made.atoms.push(Atom::Literal(' '));
                    let replacement = part["replacement"].as_str()?;
                    made.atoms.extend(replacement.chars().map(Atom::Literal));
                }
                // What comes behind it reads bytes in disguise.
                "ByteLevel" if at + 1 == parts.len() => {
                    if part["use_regex"] != false {
                        made.push_pattern(BYTE_LEVEL)?;
                    }
                }
                _ => return None,
            }
        }
        Some(made)
    }

    /// The class of each character of `text`, and whether there is a guard among them; `None` where
    /// the text may not be cut as it is. Behind a text with a guard, classes of one without do not
    /// tell how it is cut.
    pub fn shape(&mut self, text: &str, out: &mut Vec<u32>) -> Option<bool> {
        out.clear();
        if (self.ascii_only && !text.is_ascii())
            || self.replacement.is_some_and(|c| text.contains(c))
        {
            return None;
        }
        let guarded = text.contains(&self.guards[..]);
        for c in text.chars() {
            let class = match self.known[usize::from(guarded)].get(&c) {
                Some(&class) => class,
                None => self.classify(c, guarded),
            };
            out.push(class);
        }
        Some(guarded)
    }

    /// As [`CharClasses::shape`], of a text whose characters have been met before; `None` also for
    /// others.
    pub fn known_shape(&self, text: &str, out: &mut Vec<u32>) -> Option<bool> {
        out.clear();
        if (self.ascii_only && !text.is_ascii())
            || self.replacement.is_some_and(|c| text.contains(c))
        {
            return None;
        }
        let guarded = text.contains(&self.guards[..]);
        let known = &self.known[usize::from(guarded)];
        for c in text.chars() {
            out.push(*known.get(&c)?);
        }
        Some(guarded)
    }

    fn classify(&mut self, c: char, guarded: bool) -> u32 {
        let mut in_atoms: Vec<bool> = self.atoms.iter().map(|atom| atom.holds(c)).collect();
        if guarded {
            in_atoms.extend(self.guarded.iter().map(|atom| atom.holds(c)));
            in_atoms.push(true);
        }
        let next = self.classes.len() as u32;
        let class = *self.classes.entry(in_atoms).or_insert(next);
        self.known[usize::from(guarded)].insert(c, class);
        class
    }

    /// Adds the sets of characters that a regular expression names; `None` for one that this does
    /// not read.
    fn push_pattern(&mut self, pattern: &str) -> Option<()> {
        let mut found = Sets::default();
        let rest = alternation(pattern, &mut found)?;
        if !rest.is_empty() {
            return None;
        }
        for (sets, atoms) in [
            (found.open, &mut self.atoms),
            (found.guarded, &mut self.guarded),
        ] {
            for set in sets {
                // Each with and without regard to case: which counts depends on the group.
                for flags in ["s", "si"] {
                    let set = SysRegex::new(&format!("(?{flags}:{set})")).ok()?;
                    atoms.push(Atom::Set(set));
                }
            }
        }
        self.guards.extend(found.guards);
        Some(())
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

/// The sets that a pattern names, as they are written.
#[derive(Debug, Default)]
struct Sets {
    open: BTreeSet<String>,
    guarded: BTreeSet<String>,
    guards: BTreeSet<char>,
}

/// Reads branches up to the end of a group or of the pattern; returns what is left.
fn alternation<'p>(pattern: &'p str, found: &mut Sets) -> Option<&'p str> {
    let mut rest = pattern;
    loop {
        let mut branch = Sets::default();
        let guard = guard_of(rest);
        let looks_around;
        (rest, looks_around) = sequence(rest, &mut branch)?;
        match guard {
            Some(guard) if !looks_around => {
                found.open.insert(quoted(guard));
                found.guards.insert(guard);
                found.guarded.append(&mut branch.open);
            }
            _ => found.open.append(&mut branch.open),
        }
        found.guarded.append(&mut branch.guarded);
        found.guards.append(&mut branch.guards);
        match rest.strip_prefix('|') {
            Some(next) => rest = next,
            None => return Some(rest),
        }
    }
}

/// The character that a branch must begin with, where it has no case and stands alone.
fn guard_of(branch: &str) -> Option<char> {
    let mut chars = branch.chars();
    let guard = chars.next()?;
    let plain = guard.is_ascii_punctuation() && !r"\[](){}|*+?^$.".contains(guard);
    let repeated = chars.next().is_some_and(|c| "?*+{".contains(c));
    (plain && !repeated).then_some(guard)
}

fn quoted(c: char) -> String {
    format!("[{c}]")
}

/// Reads one branch; returns what is left, and whether the branch looks around.
fn sequence<'p>(pattern: &'p str, found: &mut Sets) -> Option<(&'p str, bool)> {
    let mut rest = pattern;
    let mut looks_around = false;
    while let Some(c) = rest.chars().next() {
        let size = match c {
            '|' | ')' => break,
            '(' => {
                let opening = match rest.starts_with("(?") {
                    true => group_length(rest)?,
                    false => 1,
                };
                looks_around |= ["(?=", "(?!", "(?<"]
                    .iter()
                    .any(|open| rest.starts_with(open));
                // A flag for what follows has no group of its own.
                if rest[..opening].ends_with(')') {
                    rest = &rest[opening..];
                    continue;
                }
                rest = alternation(&rest[opening..], found)?.strip_prefix(')')?;
                continue;
            }
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
            '*' | '+' | '?' | '^' | '$' => {
                rest = &rest[1..];
                continue;
            }
            _ => c.len_utf8(),
        };
        let set = &rest[..size];
        rest = &rest[size..];
        match set {
            r"\b" | r"\B" => {
                looks_around = true;
                found.open.insert(r"\w".to_owned());
            }
            r"\A" | r"\z" | r"\Z" | r"\G" => looks_around = true,
            set => {
                found.open.insert(set.to_owned());
            }
        }
    }
    Some((rest, looks_around))
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
        let chars: Vec<char> = "abzstSTlLKſ'\u{212a}12٣Ⅷ \t\n\r\u{a0}.,!?_-/日éß"
            .chars()
            .collect();
        for pattern in [LLAMA3, BYTE_LEVEL, r"[!\]\-a-c][A-Z]+|\d{2,}|\b\w|x"] {
            let cut = cut(pattern);
            let mut classes = CharClasses::of(&cut).unwrap();
            let mut seen: FxHashMap<Vec<u32>, (String, Vec<usize>)> = FxHashMap::default();
            let mut state = 7u64;
            let mut repeated = 0;
            for _ in 0..6_000 {
                let text: String = (0..4)
                    .map(|_| {
                        state = state
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1);
                        chars[(state >> 33) as usize % chars.len()]
                    })
                    .collect();
                let mut shape = Vec::new();
                assert!(classes.shape(&text, &mut shape).is_some());
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
        let texts = ["bonk", "stll", "bo1k", "'bonk", "'zipu", "'lonk"];
        let shapes = texts.map(|text| {
            let mut shape = Vec::new();
            let guarded = classes.shape(text, &mut shape);
            assert_eq!(guarded, Some(text.starts_with('\'')));
            shape
        });
        assert_eq!(shapes[0], shapes[1]);
        assert_ne!(shapes[0], shapes[2]);
        assert_eq!(shapes[3], shapes[4]);
        assert_ne!(shapes[4], shapes[5], "'l is one of the contractions");
    }

    #[test]
    fn what_reads_more_than_characters_has_no_classes() {
        assert!(CharClasses::of(&cut(r"(a)b")).is_some());
        assert!(CharClasses::of(&cut(r"(?:a|(?i)b)+?[x-y]{2}")).is_some());
        for pattern in [r"(a)\1", r"(?<name>a)", r"\R", "a)", "(a"] {
            assert!(
                alternation(pattern, &mut Sets::default()) != Some(""),
                "{pattern}"
            );
        }
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
        assert_eq!(classes.shape("e1", &mut Vec::new()), Some(false));
        assert_eq!(classes.shape("é1", &mut Vec::new()), None);
    }
}
