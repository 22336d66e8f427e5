//! Surfaces to bytes: how tokenizers print a token, and what the print stands for.
//!
//! Three spellings occur: the byte-level alphabet of GPT-2 (a bijection between the 256 bytes and
//! 256 printable characters, computed here from its rule), the metaspace `▁` for a space, and
//! `<0xNN>` for a single byte.

use serde::{Deserialize, Serialize};

/// SentencePiece's visible space, U+2581.
pub const METASPACE: char = '\u{2581}';

/// How a tokenizer's own files write the bytes of a token.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Spelling {
    /// Explicit bytes: lists, tiktoken and tekken rank files.
    Bytes,
    /// One character of GPT-2's byte-level alphabet per byte.
    ByteLevel,
    /// SentencePiece: a replacement character stands for a space, and `<0xNN>` for a byte.
    Metaspace {
        /// Usually `▁`.
        replacement: char,
        /// Whether the decoder turns `<0xNN>` into a byte.
        byte_fallback: bool,
    },
    /// BERT: a prefix continues a word, otherwise a space precedes. Lossy: case, accents and white
    /// space are not in the tokens.
    WordPiece {
        /// Usually `##`.
        prefix: String,
    },
}

impl Spelling {
    /// The spelling of SentencePiece models with byte fallback.
    #[must_use]
    pub fn sentencepiece() -> Self {
        Spelling::Metaspace {
            replacement: METASPACE,
            byte_fallback: true,
        }
    }

    /// The name that users see.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Spelling::Bytes => "bytes",
            Spelling::ByteLevel => "byte-level",
            Spelling::Metaspace { .. } => "sentencepiece",
            Spelling::WordPiece { .. } => "wordpiece (lossy)",
        }
    }

    /// Whether the tokens do not determine the text.
    #[must_use]
    pub fn is_lossy(&self) -> bool {
        matches!(self, Spelling::WordPiece { .. })
    }
}

/// The character of a string that holds no other.
pub(crate) fn single_char(text: &str) -> Option<char> {
    let mut chars = text.chars();
    chars.next().filter(|_| chars.next().is_none())
}

/// The character that byte-level tokenizers print for `byte`.
///
/// Printable Latin-1 stands for itself; the other 68 bytes take U+0100, U+0101, ... in byte order.
#[must_use]
pub fn byte_to_char(byte: u8) -> char {
    if is_printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !is_printable(b)).count() as u32;
    // 0x100 + 67 at most: always a valid scalar value.
    char::from_u32(0x100 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// Reads surfaces in the byte-level alphabet.
#[derive(Debug, Clone)]
pub struct ByteLevel {
    /// Byte of each character below U+0144, or `NONE`.
    byte_of: [u16; 0x144],
}

const NONE: u16 = u16::MAX;

impl Default for ByteLevel {
    fn default() -> Self {
        let mut byte_of = [NONE; 0x144];
        for byte in 0..=u8::MAX {
            byte_of[byte_to_char(byte) as usize] = u16::from(byte);
        }
        Self { byte_of }
    }
}

impl ByteLevel {
    /// Appends the bytes that `surface` stands for; `false`, and nothing appended, where a
    /// character is outside the alphabet.
    pub fn push_bytes(&self, surface: &str, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        for c in surface.chars() {
            match self.byte_of.get(c as usize) {
                Some(&byte) if byte != NONE => out.push(byte as u8),
                _ => {
                    out.truncate(start);
                    return false;
                }
            }
        }
        true
    }
}

/// The byte that a surface of the form `<0xNN>` stands for.
#[must_use]
pub fn byte_fallback(surface: &str) -> Option<u8> {
    let digits = surface.strip_prefix("<0x")?.strip_suffix('>')?;
    // from_str_radix alone would accept a sign.
    if digits.len() != 2 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_a_bijection_with_its_known_values() {
        let level = ByteLevel::default();
        for byte in 0..=u8::MAX {
            let mut out = Vec::new();
            assert!(level.push_bytes(&byte_to_char(byte).to_string(), &mut out));
            assert_eq!(out, [byte]);
        }
        assert_eq!(byte_to_char(b' '), 'Ġ');
        assert_eq!(byte_to_char(b'\n'), 'Ċ');
        assert_eq!(byte_to_char(b'\t'), 'ĉ');
        assert_eq!(byte_to_char(0xAD), 'Ń');
    }

    #[test]
    fn a_character_outside_the_alphabet_appends_nothing() {
        let mut out = vec![1];
        assert!(!ByteLevel::default().push_bytes("a ", &mut out));
        assert!(!ByteLevel::default().push_bytes("a▁", &mut out));
        assert_eq!(out, [1]);
    }

    #[test]
    fn byte_fallback_takes_two_hex_digits_and_nothing_else() {
        assert_eq!(byte_fallback("<0x0A>"), Some(b'\n'));
        assert_eq!(byte_fallback("<0xff>"), Some(0xFF));
        for other in ["<0x+A>", "<0x0>", "<0x0A", "0x0A", "<0x00A>", "<0xé>"] {
            assert_eq!(byte_fallback(other), None, "{other}");
        }
    }
}
