//! Exchanging student and teacher exchanges the sides of the answer, whatever the vocabularies and
//! the ids; and no input makes an alignment panic, hang or lose a token.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use xtoken::{
    AlignOptions, Aligner, AlignmentBatch, ChunkKind, DummyPrefix, Role, Spelling, TokenKind,
    Vocab, VocabBuilder,
};

use crate::common::draws;

/// Letters that often agree, spaces, and parts of characters.
const BYTES: [u8; 9] = *b"aab \n\xC3\xA9\xE2\x9F";

#[derive(Debug, Clone)]
enum Token {
    Text(Vec<u8>),
    Special,
    Unused,
}

/// Also tokens without bytes, the same bytes again, and more of them than the direct map holds.
fn token() -> impl Strategy<Value = Token> {
    let text = |sizes| vec(prop::sample::select(&BYTES[..]), sizes);
    prop_oneof![
        12 => text(0..5).prop_map(Token::Text),
        2 => text(5..40).prop_map(Token::Text),
        1 => (text(1..3), 80..200usize).prop_map(|(unit, times)| Token::Text(unit.repeat(times))),
        1 => vec(any::<u8>(), 0..4).prop_map(Token::Text),
        2 => Just(Token::Special),
        1 => Just(Token::Unused),
    ]
}

fn vocab() -> impl Strategy<Value = Arc<Vocab>> {
    let dummy = prop::sample::select(
        &[
            DummyPrefix::Never,
            DummyPrefix::Never,
            DummyPrefix::First,
            DummyPrefix::Every,
        ][..],
    );
    (vec(token(), 1..24), dummy).prop_map(|(tokens, dummy)| {
        let mut builder = VocabBuilder::new(Spelling::sentencepiece(), dummy);
        // A token for each byte, so that any text can be spelled.
        for byte in BYTES {
            builder.push_text(&[byte]).unwrap();
        }
        for (at, token) in tokens.into_iter().enumerate() {
            match token {
                Token::Text(bytes) => builder.push_text(&bytes).unwrap(),
                Token::Special => builder.push_special(&format!("<{at}>")).unwrap(),
                Token::Unused => builder.push_unused().unwrap(),
            };
        }
        let mut vocab = builder.build();
        let specials: Vec<u32> = vocab.specials().map(|(id, _)| id).collect();
        for (&id, role) in specials.iter().zip([Role::Bos, Role::Eos, Role::Unk]) {
            vocab.set_role(role, Some(id)).unwrap();
        }
        Arc::new(vocab)
    })
}

/// Two vocabularies; one in four times the same one twice.
fn vocabs() -> impl Strategy<Value = (Arc<Vocab>, Arc<Vocab>)> {
    (vocab(), vocab(), 0..4).prop_map(|(student, teacher, same)| {
        let teacher = if same == 0 { student.clone() } else { teacher };
        (student, teacher)
    })
}

#[derive(Clone)]
struct Input {
    student: Arc<Vocab>,
    teacher: Arc<Vocab>,
    student_ids: Vec<i64>,
    teacher_ids: Vec<i64>,
    /// Pairs of specials in place of those of one role.
    pairs: Option<Vec<(i64, i64)>>,
}

/// Short enough to be read where a law fails.
impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sides = [
            (&self.student, &self.student_ids),
            (&self.teacher, &self.teacher_ids),
        ];
        for (vocab, ids) in sides {
            write!(f, "\n{:?}:", vocab.dummy_prefix())?;
            for &id in ids {
                let bytes = vocab.token_bytes(id as u32).escape_ascii();
                write!(f, " {id} {:?} \"{bytes}\",", vocab.kind(id as u32))?;
            }
        }
        write!(f, "\npairs {:?}", self.pairs)
    }
}

/// The ids of some segmentation of `text`, with tokens without text in it here and there.
fn spell(vocab: &Vocab, text: &[u8], picks: &[Index]) -> Vec<i64> {
    let silent: Vec<u32> = (0..vocab.len() as u32)
        .filter(|&id| vocab.token_bytes(id).is_empty())
        .collect();
    let (mut ids, mut rest) = (Vec::new(), text);
    for pick in picks.iter().cycle() {
        if !silent.is_empty() && pick.index(16) == 0 {
            ids.push(i64::from(silent[pick.index(silent.len())]));
        }
        let fits = |&id: &u32| {
            let bytes = vocab.token_bytes(id);
            !bytes.is_empty() && rest.starts_with(bytes)
        };
        let fitting: Vec<u32> = (0..vocab.len() as u32).filter(fits).collect();
        if fitting.is_empty() {
            break;
        }
        let id = fitting[pick.index(fitting.len())];
        ids.push(i64::from(id));
        rest = &rest[vocab.token_bytes(id).len()..];
    }
    ids
}

/// A text, and what some edits make of it: parts replaced, put in front or cut off.
fn texts(sizes: std::ops::Range<usize>) -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let text = |sizes| vec(prop::sample::select(&BYTES[..]), sizes);
    let edit = (any::<Index>(), 0..30usize, text(0..40));
    (text(sizes), vec(edit, 0..6)).prop_map(|(text, edits)| {
        let mut other = text.clone();
        for (at, dropped, put) in edits {
            let start = at.index(other.len() + 1);
            let end = other.len().min(start + dropped);
            other.splice(start..end, put);
        }
        (text, other)
    })
}

fn pairs(student: &Vocab, teacher: &Vocab, picks: &[(Index, Index)]) -> Vec<(i64, i64)> {
    let ids =
        |vocab: &Vocab| -> Vec<i64> { vocab.specials().map(|(id, _)| i64::from(id)).collect() };
    let (student, teacher) = (ids(student), ids(teacher));
    if student.is_empty() || teacher.is_empty() {
        return Vec::new();
    }
    picks
        .iter()
        .map(|(s, t)| {
            (
                student[s.index(student.len())],
                teacher[t.index(teacher.len())],
            )
        })
        .collect()
}

/// Texts that differ in part, or ids of no text at all.
fn input(sizes: std::ops::Range<usize>) -> impl Strategy<Value = Input> {
    let picks = || vec(any::<Index>(), 1..40);
    let role_pairs = prop::option::of(vec((any::<Index>(), any::<Index>()), 0..6));
    (vocabs(), texts(sizes), picks(), picks(), role_pairs, 0..3).prop_map(
        |((student, teacher), (text, other), ps, pt, role_pairs, wild)| {
            let random = |vocab: &Vocab, picks: &[Index]| -> Vec<i64> {
                picks
                    .iter()
                    .map(|pick| pick.index(vocab.len()) as i64)
                    .collect()
            };
            let (student_ids, teacher_ids) = if wild == 0 {
                (random(&student, &ps), random(&teacher, &pt))
            } else {
                (spell(&student, &text, &ps), spell(&teacher, &other, &pt))
            };
            let pairs = role_pairs.map(|picks| pairs(&student, &teacher, &picks));
            Input {
                student,
                teacher,
                student_ids,
                teacher_ids,
                pairs,
            }
        },
    )
}

impl Input {
    fn align(&self, whole_characters: bool) -> AlignmentBatch {
        let options = AlignOptions {
            role_pairs: self.pairs.clone(),
            whole_characters,
        };
        let aligner = Aligner::new(self.student.clone(), self.teacher.clone(), options).unwrap();
        aligner.align(&self.student_ids, &self.teacher_ids).unwrap()
    }

    fn swapped(&self) -> Self {
        let pairs = self.pairs.as_ref();
        Self {
            student: self.teacher.clone(),
            teacher: self.student.clone(),
            student_ids: self.teacher_ids.clone(),
            teacher_ids: self.student_ids.clone(),
            pairs: pairs.map(|pairs| pairs.iter().map(|&(s, t)| (t, s)).collect()),
        }
    }

    /// What holds for any input: the chunks tile both sides, and each is what its kind says.
    fn check(&self, batch: &AlignmentBatch, whole_characters: bool) {
        let bounds = [&batch.student_bounds, &batch.teacher_bounds];
        let lengths = [self.student_ids.len(), self.teacher_ids.len()];
        for (bounds, length) in bounds.into_iter().zip(lengths) {
            assert_eq!((bounds[0], *bounds.last().unwrap()), (0, length as i64));
            assert_eq!(bounds.len(), batch.kinds.len() + 1);
            assert!(bounds.is_sorted());
        }
        let of = |vocab: &Vocab, ids: &[i64], bounds: &[i64]| -> Vec<u8> {
            let ids = &ids[bounds[0] as usize..bounds[1] as usize];
            ids.iter()
                .flat_map(|&id| vocab.token_bytes(id as u32).to_vec())
                .collect()
        };
        let may_have_dummy = [&self.student, &self.teacher]
            .iter()
            .any(|vocab| vocab.dummy_prefix() != DummyPrefix::Never);
        for (chunk, &kind) in batch.kinds.iter().enumerate() {
            let (s, t) = (&bounds[0][chunk..chunk + 2], &bounds[1][chunk..chunk + 2]);
            let (left, right) = (
                of(&self.student, &self.student_ids, s),
                of(&self.teacher, &self.teacher_ids, t),
            );
            let counts = (s[1] - s[0], t[1] - t[0]);
            match ChunkKind::ALL[usize::from(kind)] {
                ChunkKind::Exact => {
                    assert!(counts.0 > 0 && counts.1 > 0 && !left.is_empty() && !right.is_empty());
                    assert!(left == right || may_have_dummy);
                }
                ChunkKind::Mismatch => {
                    assert!(counts.0 > 0 && counts.1 > 0);
                    assert!(whole_characters || !left.is_empty() && !right.is_empty());
                }
                ChunkKind::StudentOnly => {
                    assert!(counts.1 == 0 && (counts.0 == 1 || whole_characters && counts.0 > 1));
                }
                ChunkKind::TeacherOnly => {
                    assert!(counts.0 == 0 && (counts.1 == 1 || whole_characters && counts.1 > 1));
                }
                ChunkKind::Special => {
                    assert_eq!(counts, (1, 1));
                    let ids = (
                        self.student_ids[s[0] as usize],
                        self.teacher_ids[t[0] as usize],
                    );
                    let kinds = (
                        self.student.kind(ids.0 as u32),
                        self.teacher.kind(ids.1 as u32),
                    );
                    assert_eq!(kinds, (TokenKind::Special, TokenKind::Special));
                    assert!(self.pairs.as_ref().is_none_or(|pairs| pairs.contains(&ids)));
                }
            }
        }
    }
}

/// The answer with its sides exchanged. Tokens that stand alone at the same place are listed anew,
/// the student's first.
fn mirrored(batch: &AlignmentBatch) -> AlignmentBatch {
    let (student_only, teacher_only) = (ChunkKind::StudentOnly as u8, ChunkKind::TeacherOnly as u8);
    let mut chunks: Vec<(i64, i64, u8)> = (0..batch.kinds.len())
        .map(|chunk| {
            let size = |bounds: &[i64]| bounds[chunk + 1] - bounds[chunk];
            let kind = match batch.kinds[chunk] {
                kind if kind == student_only => teacher_only,
                kind if kind == teacher_only => student_only,
                kind => kind,
            };
            (
                size(&batch.teacher_bounds),
                size(&batch.student_bounds),
                kind,
            )
        })
        .collect();
    let is_alone = |kind: u8| kind == student_only || kind == teacher_only;
    for run in chunks.chunk_by_mut(|left, right| is_alone(left.2) && is_alone(right.2)) {
        run.sort_by_key(|chunk| chunk.2);
    }
    let bounds = |size: fn(&(i64, i64, u8)) -> i64| {
        let mut bounds = vec![0];
        bounds.extend(chunks.iter().scan(0, |end, chunk| {
            *end += size(chunk);
            Some(*end)
        }));
        bounds
    };
    let mut counts = batch.counts.clone();
    for counts in &mut counts {
        std::mem::swap(&mut counts.student_bytes, &mut counts.teacher_bytes);
    }
    AlignmentBatch {
        student_bounds: bounds(|chunk| chunk.0),
        teacher_bounds: bounds(|chunk| chunk.1),
        kinds: chunks.iter().map(|chunk| chunk.2).collect(),
        chunk_indptr: batch.chunk_indptr.clone(),
        counts,
    }
}

fn keeps_the_laws(input: &Input) {
    for whole_characters in [false, true] {
        let batch = input.align(whole_characters);
        input.check(&batch, whole_characters);
        assert_eq!(mirrored(&batch), input.swapped().align(whole_characters));
    }
}

proptest! {
    #![proptest_config(draws(2000))]

    #[test]
    fn student_and_teacher_may_be_exchanged(input in input(0..120)) {
        keeps_the_laws(&input);
    }
}

proptest! {
    #![proptest_config(draws(80))]

    #[test]
    fn student_and_teacher_of_a_long_text_may_be_exchanged(input in input(1000..6000)) {
        keeps_the_laws(&input);
    }
}
