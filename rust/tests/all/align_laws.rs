//! Laws of the alignment, on random vocabularies and ids: most of them are of no tokenizer at all.

use std::ops::Range;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use xtoken::align::Scratch;
use xtoken::align::{Ragged, align_batch};
use xtoken::{
    AlignOptions, Aligner, AlignmentBatch, ChunkKind, DummyPrefix, Error, Role, Spelling, Threads,
    Vocab, VocabBuilder, reference,
};

use crate::common::draws;

/// Few distinct bytes, so that tokens often agree by accident: letters, spaces, parts of
/// characters.
const BYTES: [u8; 8] = *b"aab \xC3\xA9\xE2\x9F";

#[derive(Debug, Clone)]
struct Side {
    vocab: Arc<Vocab>,
    ids: Vec<i64>,
}

fn token() -> impl Strategy<Value = Vec<u8>> {
    vec(prop::sample::select(&BYTES[..]), 0..5)
}

fn vocab(dummy: impl Strategy<Value = DummyPrefix>) -> impl Strategy<Value = Arc<Vocab>> {
    (vec(token(), 1..12), dummy).prop_map(|(tokens, dummy_prefix)| {
        let mut builder = VocabBuilder::new(Spelling::sentencepiece(), dummy_prefix);
        builder.push_special("<s>").unwrap();
        builder.push_special("</s>").unwrap();
        builder.push_special("<other>").unwrap();
        builder.push_unused().unwrap();
        // A token for each byte, so that any text can be spelled.
        for byte in BYTES {
            builder.push_text(&[byte]).unwrap();
        }
        for token in tokens {
            builder.push_text(&token).unwrap();
        }
        Arc::new(builder.build())
    })
}

fn any_dummy() -> impl Strategy<Value = DummyPrefix> {
    prop::sample::select(&[DummyPrefix::Never, DummyPrefix::First, DummyPrefix::Every][..])
}

fn side() -> impl Strategy<Value = Side> {
    side_with(any_dummy())
}

fn side_with(dummy: impl Strategy<Value = DummyPrefix>) -> impl Strategy<Value = Side> {
    (vocab(dummy), vec(any::<prop::sample::Index>(), 0..60)).prop_map(|(vocab, picks)| {
        let ids = picks
            .iter()
            .map(|pick| pick.index(vocab.len()) as i64)
            .collect();
        Side { vocab, ids }
    })
}

/// The ids of some segmentation of `text`: at each place one of the tokens that fit.
fn spell(vocab: &Vocab, text: &[u8], picks: &[prop::sample::Index]) -> Vec<i64> {
    let (mut ids, mut rest, mut at) = (Vec::new(), text, 0);
    while !rest.is_empty() {
        let fitting: Vec<u32> = (0..vocab.len() as u32)
            .filter(|&id| {
                !vocab.token_bytes(id).is_empty() && rest.starts_with(vocab.token_bytes(id))
            })
            .collect();
        let id = fitting[picks[at % picks.len()].index(fitting.len())];
        ids.push(i64::from(id));
        rest = &rest[vocab.token_bytes(id).len()..];
        at += 1;
    }
    ids
}

/// Two spellings of one text, without dummy prefix.
fn spelled() -> impl Strategy<Value = (Side, Side)> {
    let text = vec(prop::sample::select(&BYTES[..]), 0..80);
    let picks = || vec(any::<prop::sample::Index>(), 1..20);
    let vocab = || vocab(Just(DummyPrefix::Never));
    (text, vocab(), picks(), vocab(), picks()).prop_map(|(text, student, ps, teacher, pt)| {
        let s = Side {
            ids: spell(&student, &text, &ps),
            vocab: student,
        };
        let t = Side {
            ids: spell(&teacher, &text, &pt),
            vocab: teacher,
        };
        (s, t)
    })
}

fn aligner(student: &Side, teacher: &Side, options: AlignOptions) -> Aligner {
    Aligner::new(student.vocab.clone(), teacher.vocab.clone(), options).unwrap()
}

fn bytes_of(side: &Side, bounds: &[i64], chunk: usize) -> Vec<u8> {
    let range = bounds[chunk] as usize..bounds[chunk + 1] as usize;
    side.ids[range]
        .iter()
        .flat_map(|&id| side.vocab.token_bytes(id as u32).to_vec())
        .collect()
}

/// Equal, or equal but for spaces that a dummy prefix may account for: one a segment.
fn agree(student: &Side, teacher: &Side, left: &[u8], right: &[u8]) -> bool {
    let spaceless = |bytes: &[u8]| {
        bytes
            .iter()
            .copied()
            .filter(|&b| b != b' ')
            .collect::<Vec<u8>>()
    };
    let may = |side: &Side| side.vocab.dummy_prefix() != DummyPrefix::Never;
    left == right || (may(student) || may(teacher)) && spaceless(left) == spaceless(right)
}

fn check(student: &Side, teacher: &Side, batch: &AlignmentBatch) {
    let chunks = batch.kinds.len();
    for (side, bounds) in [
        (student, &batch.student_bounds),
        (teacher, &batch.teacher_bounds),
    ] {
        assert_eq!(bounds.len(), chunks + 1);
        assert_eq!((bounds[0], bounds[chunks]), (0, side.ids.len() as i64));
        assert!(bounds.is_sorted());
    }
    let (mut exact, mut student_bytes, mut teacher_bytes) = (0, 0, 0);
    for chunk in 0..chunks {
        let left = bytes_of(student, &batch.student_bounds, chunk);
        let right = bytes_of(teacher, &batch.teacher_bounds, chunk);
        let counts = (
            batch.student_bounds[chunk + 1] - batch.student_bounds[chunk],
            batch.teacher_bounds[chunk + 1] - batch.teacher_bounds[chunk],
        );
        student_bytes += left.len() as i64;
        teacher_bytes += right.len() as i64;
        match ChunkKind::ALL[batch.kinds[chunk] as usize] {
            ChunkKind::Exact => {
                assert!(counts.0 > 0 && counts.1 > 0);
                assert!(agree(student, teacher, &left, &right), "{left:?} {right:?}");
                exact += left.len().min(right.len()) as i64;
            }
            ChunkKind::Mismatch => assert!(!left.is_empty() && !right.is_empty()),
            ChunkKind::StudentOnly => assert_eq!(counts, (1, 0)),
            ChunkKind::TeacherOnly => assert_eq!(counts, (0, 1)),
            ChunkKind::Special => {
                assert_eq!(counts, (1, 1));
                assert!(left.is_empty() && right.is_empty());
            }
        }
    }
    let counted = batch.counts[0];
    let dummies = student.ids.len() as i64 + 1;
    assert!(counted.exact_bytes <= exact && exact - counted.exact_bytes <= dummies);
    assert!(counted.student_bytes <= student_bytes && counted.teacher_bytes <= teacher_bytes);
    if student.vocab.dummy_prefix() == DummyPrefix::Never
        && teacher.vocab.dummy_prefix() == DummyPrefix::Never
    {
        assert_eq!(
            (
                counted.exact_bytes,
                counted.student_bytes,
                counted.teacher_bytes
            ),
            (exact, student_bytes, teacher_bytes)
        );
    }
}

fn texts(side: &Side) -> Vec<&[u8]> {
    side.ids
        .iter()
        .map(|&id| side.vocab.token_bytes(id as u32))
        .collect()
}

fn swapped(batch: &AlignmentBatch) -> AlignmentBatch {
    let mut other = batch.clone();
    std::mem::swap(&mut other.student_bounds, &mut other.teacher_bounds);
    other
}

proptest! {
    #![proptest_config(draws(1000))]

    #[test]
    fn any_ids_are_tiled_by_chunks_that_are_what_they_say((student, teacher) in (side(), side())) {
        for whole_characters in [false, true] {
            let options = AlignOptions { role_pairs: None, whole_characters };
            let batch = aligner(&student, &teacher, options).align(&student.ids, &teacher.ids).unwrap();
            if !whole_characters {
                check(&student, &teacher, &batch);
            }
        }
    }

    #[test]
    fn equal_bytes_get_the_finest_segmentation_from_either_side((student, teacher) in spelled()) {
        let batch = aligner(&student, &teacher, AlignOptions::default())
            .align(&student.ids, &teacher.ids)
            .unwrap();
        let (s, t) = (&batch.student_bounds, &batch.teacher_bounds);
        let chunks: Vec<_> = (0..batch.kinds.len())
            .map(|c| (s[c] as usize, s[c + 1] as usize, t[c] as usize, t[c + 1] as usize))
            .collect();
        prop_assert_eq!(chunks, reference::finest_chunks(&texts(&student), &texts(&teacher)));
        prop_assert!(batch.kinds.iter().all(|&kind| kind == ChunkKind::Exact as u8));
        let back = aligner(&teacher, &student, AlignOptions::default())
            .align(&teacher.ids, &student.ids)
            .unwrap();
        prop_assert_eq!(swapped(&back), batch);
    }

    #[test]
    fn working_memory_may_be_shared_by_pairs_of_vocabularies(sides in vec((side(), side()), 1..6)) {
        let (mut batch, mut scratch) = (AlignmentBatch::default(), Scratch::default());
        let mut alone = Vec::new();
        for (student, teacher) in sides.iter().chain(&sides) {
            let aligner = aligner(student, teacher, AlignOptions::default());
            aligner.align_into(&student.ids, &teacher.ids, &mut batch, &mut scratch).unwrap();
            aligner.align_into(&student.ids, &teacher.ids, &mut batch, &mut scratch).unwrap();
            alone.extend(vec![aligner.align(&student.ids, &teacher.ids).unwrap(); 2]);
        }
        let kinds: Vec<u8> = alone.iter().flat_map(|one| one.kinds.clone()).collect();
        let bounds: Vec<i64> = alone.iter().flat_map(|one| one.student_bounds.clone()).collect();
        let counts: Vec<_> = alone.iter().flat_map(|one| one.counts.clone()).collect();
        prop_assert_eq!((batch.kinds, batch.student_bounds, batch.counts), (kinds, bounds, counts));
    }

    #[test]
    fn ids_of_either_width_get_the_same_answer((student, teacher) in (side(), side())) {
        let aligner = aligner(&student, &teacher, AlignOptions::default());
        let narrow = |side: &Side| side.ids.iter().map(|&id| id as u32).collect::<Vec<u32>>();
        prop_assert_eq!(
            aligner.align(&narrow(&student), &narrow(&teacher)).unwrap(),
            aligner.align(&student.ids, &teacher.ids).unwrap()
        );
    }

    #[test]
    fn no_alignment_holds_more_exact_bytes_than_the_optimum(
        student in side_with(prop::sample::select(&[DummyPrefix::Never, DummyPrefix::First][..])),
        teacher in side_with(prop::sample::select(&[DummyPrefix::Never, DummyPrefix::First][..])),
    ) {
        let batch = aligner(&student, &teacher, AlignOptions::default())
            .align(&student.ids, &teacher.ids)
            .unwrap();
        let most = reference::most_exact_bytes_of_ids(
            (&student.vocab, &student.ids),
            (&teacher.vocab, &teacher.ids),
        ) as i64;
        prop_assert!(batch.counts[0].exact_bytes <= most);
    }

    #[test]
    fn ids_outside_a_vocabulary_are_named(
        (student, teacher) in (side(), side()),
        at in any::<prop::sample::Index>(),
        bad in prop_oneof![Just(-1), Just(i64::MIN), Just(i64::MAX), Just((1 << 24) - 1), 0i64..40],
    ) {
        let mut student = student;
        prop_assume!(!student.ids.is_empty());
        let at = at.index(student.ids.len());
        student.ids[at] = bad;
        let result = aligner(&student, &teacher, AlignOptions::default())
            .align(&student.ids, &teacher.ids);
        if (0..student.vocab.len() as i64).contains(&bad) {
            prop_assert!(result.is_ok());
        } else {
            let named = matches!(
                result,
                Err(Error::IdOutOfRange { side: "student", position, id, .. })
                    if position == at && id == bad
            );
            prop_assert!(named);
        }
    }

    #[test]
    fn whole_characters_are_never_cut_and_no_more_is_joined((student, teacher) in spelled()) {
        let fine = aligner(&student, &teacher, AlignOptions::default());
        let options = AlignOptions { whole_characters: true, ..AlignOptions::default() };
        let whole = aligner(&student, &teacher, options);
        let fine = fine.align(&student.ids, &teacher.ids).unwrap();
        let whole = whole.align(&student.ids, &teacher.ids).unwrap();
        check(&student, &teacher, &whole);
        let text: Vec<u8> = texts(&student).concat();
        let mut places: Vec<i64> = whole.student_bounds.clone();
        for &bound in &fine.student_bounds {
            let at: usize = texts(&student)[..bound as usize].iter().map(|token| token.len()).sum();
            let cut = cuts_a_character(&text, at);
            prop_assert_eq!(!cut, places.contains(&bound), "at {} of {:?}", at, text);
            places.retain(|&place| place != bound);
        }
        prop_assert!(places.is_empty());
    }

    #[test]
    fn threads_and_company_change_nothing(pairs in vec((vec(any::<prop::sample::Index>(), 0..30),
                                                        vec(any::<prop::sample::Index>(), 0..30)), 0..20),
                                          (student, teacher) in (vocab(any_dummy()), vocab(any_dummy()))) {
        let flat = |vocab: &Vocab, sequences: Vec<&Vec<prop::sample::Index>>| {
            let mut ids: Vec<i64> = Vec::new();
            let ranges: Vec<Range<usize>> = sequences
                .into_iter()
                .map(|picks| {
                    ids.push(-7); // padding, which nobody may look at
                    let start = ids.len();
                    ids.extend(picks.iter().map(|pick| pick.index(vocab.len()) as i64));
                    start..ids.len()
                })
                .collect();
            (ids, ranges)
        };
        let (s, s_ranges) = flat(&student, pairs.iter().map(|pair| &pair.0).collect());
        let (t, t_ranges) = flat(&teacher, pairs.iter().map(|pair| &pair.1).collect());
        let aligner = Aligner::new(student, teacher, AlignOptions::default()).unwrap();
        let batch = |threads: usize| {
            let threads = Threads::new(threads).unwrap();
            let student = Ragged { ids: &s, ranges: &s_ranges };
            align_batch(&aligner, student, Ragged { ids: &t, ranges: &t_ranges }, &threads).unwrap()
        };
        let one = batch(1);
        prop_assert_eq!(&batch(0), &one);
        prop_assert_eq!(&batch(3), &one);
        for (b, (s_range, t_range)) in s_ranges.iter().zip(&t_ranges).enumerate() {
            let alone = aligner.align(&s[s_range.clone()], &t[t_range.clone()]).unwrap();
            let chunks = one.chunk_indptr[b] as usize..one.chunk_indptr[b + 1] as usize;
            prop_assert_eq!(&one.kinds[chunks.clone()], &alone.kinds[..]);
            let bounds = chunks.start + b..chunks.end + b + 1;
            prop_assert_eq!(&one.student_bounds[bounds.clone()], &alone.student_bounds[..]);
            prop_assert_eq!(&one.teacher_bounds[bounds], &alone.teacher_bounds[..]);
        }
    }
}

fn cuts_a_character(text: &[u8], at: usize) -> bool {
    let continues = |at: usize| text.get(at).is_some_and(|byte| byte & 0xC0 == 0x80);
    if !continues(at) {
        return false;
    }
    let start = (at.saturating_sub(3)..at).rev().find(|&at| !continues(at));
    start.is_some_and(|start| {
        let length = match text[start] {
            0xC3 => 2,
            0xE2 => 3,
            _ => 1,
        };
        start + length > at
    })
}

#[test]
fn roles_pair_only_specials() {
    let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
    builder.push_text(b"a").unwrap();
    let mut vocab = builder.build();
    vocab.set_role(Role::Eos, Some(0)).unwrap();
    let vocab = Arc::new(vocab);
    let aligner = Aligner::new(vocab.clone(), vocab, AlignOptions::default()).unwrap();
    assert!(aligner.role_pairs().is_empty());
    assert_eq!(
        aligner.align(&[0u32], &[0u32]).unwrap().kinds,
        [ChunkKind::Exact as u8]
    );
}
