//! Named rows: small inputs and their whole answers. A bug that is fixed leaves a row behind.

use std::sync::Arc;

use xtoken::{AlignOptions, Aligner, ChunkKind, DummyPrefix, Role, Spelling, Vocab, VocabBuilder};

/// A row: name, the tokens of both sides, the options, the chunks.
///
/// Tokens stand between `|`, `<...>` is special, `<unused>` a hole. Options: `s1` and `t1` put a
/// dummy prefix before the first text of a side, `s*` and `t*` after each special as well, `chars`
/// keeps characters whole. Chunks: `=` exact, `!` mismatch, `S` and `T` one-sided, `P` a special
/// pair; then the number of tokens where it is not one a side.
type Row = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
);

#[rustfmt::skip]
const ROWS: &[Row] = &[
    // Equal bytes.
    ("both empty", "", "", "", ""),
    ("one to one", "a|b", "a|b", "", "= ="),
    ("split and joined", "ab|c|d", "a|b|cd", "", "=1:2 =2:1"),
    ("no inner boundary", "abc|de", "ab|cde", "", "=2:2"),
    ("tokens without bytes inside a chunk", "ab|<unused>|c", "abc", "", "=3:1"),
    // Lengths alone are not enough.
    ("equal length, other bytes", "ab|cdefghijklmnopqrst", "ba|cdefghijklmnopqrst", "", "! ="),
    ("reordered marks", "\u{651}\u{64e}|abcdefghijklmnopqrs", "\u{64e}\u{651}|abcdefghijklmnopqrs", "", "! ="),
    // Special tokens.
    ("BOS on one side", "<bos>|a|b", "a|b", "", "S = ="),
    ("BOS on both sides", "<bos>|a", "<bos>|a", "", "P ="),
    ("BOS and EOS pair by role", "<bos>|a|<eos>", "<bos>|a|<eos>", "", "P = P"),
    ("a role that only one side has", "<bos>|a", "<other>|a", "", "S T ="),
    ("specials of no role, the student's first", "<x>|<y>|a", "<z>|a", "", "S S T ="),
    ("markers around text", "a|<eos>|<bos>|b", "a|<eos>|b", "", "= P S ="),
    ("of crossing pairs, the more even one", "<unused>|<bos>|<eos>|a", "<eos>|<bos>|a", "", "S T P S ="),
    ("of crossing pairs, that of the smaller ids", "ab|<bos>|<eos>|c", "a|b|<eos>|<bos>|c", "", "=1:2 T P S ="),
    ("crossing pairs of the same ids pair up with nothing", "<bos>|<eos>|a", "<eos>|<bos>|a", "", "S S T T ="),
    ("a pair beyond sixteen specials", "<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<eos>|a", "<eos>|a", "", "S S S S S S S S S S S S S S S S S S P ="),
    ("specials at the end, past a pair", "a|<x>", "a|<x>|<eos>", "", "= S T T"),
    ("specials that one side spells", "a|<eos>|bcdefghijklmnopqrst", "a|<|/s|>|bcdefghijklmnopqrst", "", "= S T T T ="),
    // Dummy prefix.
    ("dummy prefix in a token", " a|b", "a|b", "s1", "= ="),
    ("dummy prefix alone", " |a|b", "a|b", "s1", "S = ="),
    ("dummy prefix after BOS", "<bos>| a|b", "a|b", "s1", "S = ="),
    ("dummy prefix on both sides", " a|b", " a|b", "s1 t1", "= ="),
    ("a space of the text stays", "  a|b", " a|b", "s1", "= ="),
    ("a space that only one side has is no dummy prefix twice", "  a|bcdefghijklmnopqrstu", "a|bcdefghijklmnopqrstu", "s1", "! ="),
    ("dummy prefix after each special", " a|<bos>| b", "a|b", "s*", "= S ="),
    ("no dummy prefix but the first", " a|<x>| b|cdefghijklmnopqrstu", "a|b|cdefghijklmnopqrstu", "s1", "= S ! ="),
    ("a thousand spaces are left alone", "{1025 }a|bcdefghijklmnopqrst", "{1024 }a|bcdefghijklmnopqrst", "s1", "! ="),
    // Differences.
    ("one side is empty", "a|b", "", "", "S S"),
    ("nothing in common", "a|b", "c", "", "!2:1"),
    ("a cut tail", "a|b|c", "a", "", "= S S"),
    ("a token cut in two", "abcd|e", "ab", "", "! S"),
    ("a dropped space", "a| b|cdefghijklmnopqrstu", "a|b|cdefghijklmnopqrstu", "", "= ! ="),
    ("a dropped token", "a|b|cdefghijklmnopqrstu", "a|cdefghijklmnopqrstu", "", "= S ="),
    ("a replaced word", "a|xy|z|cdefghijklmnopqrstu", "a|v|cdefghijklmnopqrstu", "", "= !2:1 ="),
    ("a replacement character", "a|\u{e9}|cdefghijklmnopqrstu", "a|\u{fffd}|cdefghijklmnopqrstu", "", "= ! ="),
    ("a header on one side", "x|y|z|cdefghijklmnopqrstu", "cdefghijklmnopqrstu", "", "S S S ="),
    ("two differences", "a|x|cdefghijklmnopqrstu|x", "a|y|cdefghijklmnopqrstu|y", "", "= ! = !"),
    ("a special between differences", "a|<eos>|b", "c|<eos>|d", "", "! P !"),
    // Vocabularies.
    ("a token of more bytes than the map holds", "{300a}|b", "{300a}|b", "", "= ="),
    ("a long token in parts", "{300a}|b", "{150a}|{150a}|b", "", "=1:2 ="),
    // Whole characters.
    ("a character in two tokens", "\\xc3|\\xa9|a", "\\xc3|\\xa9|a", "chars", "=2:2 ="),
    ("a special inside a character", "\\xc3|<x>|\\xa9", "\u{e9}", "chars", "=3:1"),
    ("a pair inside a character", "\\xc3|<bos>|\\xa9", "\\xc3|<bos>|\\xa9", "chars", "=3:3"),
    ("a broken character is none", "\\xc3|a|\\xa9", "\\xc3|a|\\xa9", "chars", "= = ="),
    ("a character that one side lacks", "\\xc3|\\xa9", "", "chars", "S2"),
    ("a special after a character that one side lacks", "\\xc3|\\xa9", "<x>", "chars", "S2 T"),
    ("a special where the other side goes on with a character", "\\xc3|\\xa9|abcdefghijklmnopqrst", "\\xc3|<x>|abcdefghijklmnopqrst", "chars", "!2:2 ="),
    ("many specials inside a character belong to the side that has them", "\\xc3|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|<x>|\\xa9", "", "chars", "S S S S S S S S S S S S S S S S S S S"),
];

/// The bytes of a token: `\xNN` is a byte, `{Nc}` repeats a character.
fn bytes_of(token: &str) -> Vec<u8> {
    if let Some((repeated, rest)) = token
        .strip_prefix('{')
        .and_then(|rest| rest.split_once('}'))
    {
        let (times, unit) = repeated.split_at(repeated.len() - 1);
        return [
            unit.repeat(times.parse().unwrap()).into_bytes(),
            bytes_of(rest),
        ]
        .concat();
    }
    match token.strip_prefix("\\x") {
        Some(hex) => vec![u8::from_str_radix(hex, 16).unwrap()],
        None => token.as_bytes().to_vec(),
    }
}

/// A vocabulary of the tokens of one side, and their ids.
fn side(tokens: &str, dummy_prefix: DummyPrefix) -> (Arc<Vocab>, Vec<u32>) {
    let mut builder = VocabBuilder::new(Spelling::sentencepiece(), dummy_prefix);
    let mut roles = Vec::new();
    let tokens = tokens.split('|').filter(|token| !token.is_empty());
    let ids = tokens
        .map(|token| match token {
            "<unused>" => builder.push_unused().unwrap(),
            _ if token.starts_with('<') && token.ends_with('>') => {
                let id = builder.push_special(token).unwrap();
                match token {
                    "<bos>" => roles.push((Role::Bos, id)),
                    "<eos>" => roles.push((Role::Eos, id)),
                    _ => {}
                }
                id
            }
            _ => builder.push_text(&bytes_of(token)).unwrap(),
        })
        .collect();
    let mut vocab = builder.build();
    for (role, id) in roles {
        vocab.set_role(role, Some(id)).unwrap();
    }
    (Arc::new(vocab), ids)
}

fn dummy_prefix(options: &str, side: char) -> DummyPrefix {
    let has = |mark: char| {
        options
            .split(' ')
            .any(|option| option == format!("{side}{mark}"))
    };
    match (has('1'), has('*')) {
        (_, true) => DummyPrefix::Every,
        (true, _) => DummyPrefix::First,
        _ => DummyPrefix::Never,
    }
}

/// The chunks of two sides, as a row has them.
fn chunks(
    student: (&str, DummyPrefix),
    teacher: (&str, DummyPrefix),
    options: &str,
) -> Vec<String> {
    let (student, student_ids) = side(student.0, student.1);
    let (teacher, teacher_ids) = side(teacher.0, teacher.1);
    let options = AlignOptions {
        role_pairs: None,
        whole_characters: options.contains("chars"),
    };
    let aligner = Aligner::new(student, teacher, options).unwrap();
    let batch = aligner.align(&student_ids, &teacher_ids).unwrap();
    let size = |bounds: &[i64], chunk: usize| bounds[chunk + 1] - bounds[chunk];
    let chunk = |at: usize| {
        let sizes = (
            size(&batch.student_bounds, at),
            size(&batch.teacher_bounds, at),
        );
        let kind = ChunkKind::ALL[usize::from(batch.kinds[at])];
        let mark = match kind {
            ChunkKind::Exact => "=",
            ChunkKind::Mismatch => "!",
            ChunkKind::StudentOnly => "S",
            ChunkKind::TeacherOnly => "T",
            ChunkKind::Special => "P",
        };
        match (kind, sizes) {
            (ChunkKind::StudentOnly, (1, 0)) | (ChunkKind::TeacherOnly, (0, 1)) | (_, (1, 1)) => {
                mark.to_owned()
            }
            (ChunkKind::StudentOnly, (count, 0)) | (ChunkKind::TeacherOnly, (0, count)) => {
                format!("{mark}{count}")
            }
            _ => format!("{mark}{}:{}", sizes.0, sizes.1),
        }
    };
    (0..batch.kinds.len()).map(chunk).collect()
}

/// A chunk with its sides exchanged.
fn mirrored(chunk: &str) -> String {
    let (mark, sizes) = chunk.split_at(1);
    let mark = match mark {
        "S" => "T",
        "T" => "S",
        _ => mark,
    };
    match sizes.split_once(':') {
        Some((student, teacher)) => format!("{mark}{teacher}:{student}"),
        None => format!("{mark}{sizes}"),
    }
}

#[test]
fn every_row_has_its_answer_from_either_side() {
    let mut wrong = Vec::new();
    for &(name, left, right, options, expected) in ROWS {
        let expected: Vec<String> = expected.split_whitespace().map(str::to_owned).collect();
        let student = (left, dummy_prefix(options, 's'));
        let teacher = (right, dummy_prefix(options, 't'));
        let found = chunks(student, teacher, options);
        if found != expected {
            wrong.push(format!("{name}: {found:?} where {expected:?} was expected"));
        }
        // Of tokens alone at the same place, the student's are listed first.
        let is_alone = |chunk: &String| chunk.starts_with(['S', 'T']);
        let mut mirror: Vec<String> = expected.iter().map(|chunk| mirrored(chunk)).collect();
        for run in mirror.chunk_by_mut(|left, right| is_alone(left) && is_alone(right)) {
            run.sort_by(|left, right| left[..1].cmp(&right[..1]));
        }
        let found = chunks(teacher, student, options);
        if found != mirror {
            wrong.push(format!(
                "{name}, exchanged: {found:?} where {mirror:?} was expected"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
