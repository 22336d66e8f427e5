//! Pairs of special tokens: those that the caller declares, then all that stops, then by role, then
//! by name.

use super::{Options, Rule};
use crate::vocab::Role;
use crate::vocab::{TokenKind, Vocab};

/// (student id, teacher id, the rule that paired them).
pub(super) type Pair = (u32, u32, Rule);

pub(super) fn pair(student: &Vocab, teacher: &Vocab, options: &Options) -> Vec<Pair> {
    let mut pairs: Vec<Pair> = options
        .special_pairs
        .iter()
        .map(|&(s, t)| (s, t, Rule::Role))
        .collect();
    let teacher_stops = Stops::of(teacher, options);
    stops(student, teacher, options, &teacher_stops, &mut pairs);
    for role in [Role::Bos, Role::Pad, Role::Unk] {
        let (Some(s), Some(t)) = (student.role(role), teacher.role(role)) else {
            continue;
        };
        // Many tokenizers declare their EOS as padding or unknown token too; another tokenizer's
        // padding does not correspond to an EOS.
        let borrowed = matches!(role, Role::Pad | Role::Unk)
            && plays_another(teacher, role, t)
            && !plays_another(student, role, s);
        // What starts a sequence is no stop, unless it is the only one there is.
        let folded = teacher_stops.all.contains(&t)
            && pairs.iter().all(|pair| pair.1 != t)
            && teacher_stops.representative(&pairs).is_some();
        if !options.ignored_roles.contains(&role)
            && !borrowed
            && !folded
            && student.kind(s) == TokenKind::Special
            && pairs.iter().all(|pair| pair.0 != s)
        {
            pairs.push((s, t, Rule::Role));
        }
    }
    named_as_a_stop(student, teacher, options, &teacher_stops, &mut pairs);
    by_name(student, teacher, options, &teacher_stops, &mut pairs);
    pairs
}

/// Teacher stops that no row reaches, each with the reached one that stands for it: all stops of a
/// side are one event, which a student with fewer of them cannot tell apart.
pub(super) fn stop_folds(teacher: &Vocab, options: &Options, reached: &[i64]) -> Vec<(u32, u32)> {
    let stops = Stops::of(teacher, options).all;
    let is_reached = |stop: u32| reached.contains(&i64::from(stop));
    let Some(representative) = stops.iter().copied().find(|&stop| is_reached(stop)) else {
        return Vec::new();
    };
    let mut folds: Vec<(u32, u32)> = stops
        .into_iter()
        .filter(|&stop| !is_reached(stop))
        .map(|stop| (stop, representative))
        .collect();
    folds.sort_unstable();
    folds
}

/// What stops one side.
struct Stops {
    /// In order of preference, as [`Vocab::stops`], but for roles that are ignored.
    all: Vec<u32>,
    /// What a turn ends with, where that is known.
    turn: Option<u32>,
    /// What a document ends with.
    document: Option<u32>,
}

impl Stops {
    fn of(vocab: &Vocab, options: &Options) -> Self {
        let role = |role| {
            vocab.role(role).filter(|&id| {
                !options.ignored_roles.contains(&role) && vocab.kind(id) != TokenKind::Unused
            })
        };
        let (end_of_turn, document) = (role(Role::EndOfTurn), role(Role::Eos));
        let declared = vocab.declared_stops();
        let all: Vec<u32> = vocab
            .stops()
            .into_iter()
            .filter(|&id| declared.contains(&id) || Some(id) == end_of_turn || Some(id) == document)
            .collect();
        let turn = all
            .first()
            .copied()
            .filter(|&id| declared.contains(&id))
            .or(end_of_turn);
        Self {
            all,
            turn,
            document,
        }
    }

    /// The first that a pair reaches.
    fn representative(&self, pairs: &[Pair]) -> Option<u32> {
        let reached = |stop: &u32| pairs.iter().any(|pair| pair.1 == *stop);
        self.all.iter().copied().find(reached)
    }
}

/// Pairs each student stop with the one that the teacher prints at that place.
fn stops(
    student: &Vocab,
    teacher: &Vocab,
    options: &Options,
    teacher_stops: &Stops,
    pairs: &mut Vec<Pair>,
) {
    let Some(&preferred) = teacher_stops.all.first() else {
        return;
    };
    let student_stops = Stops::of(student, options);
    for &s in &student_stops.all {
        // Text that is spelled alike goes by its bytes.
        let is_text = student.kind(s) != TokenKind::Special;
        if is_text && teacher.id_of(student.token_bytes(s)).is_some()
            || pairs.iter().any(|pair| pair.0 == s)
        {
            continue;
        }
        let counterpart = if student_stops.turn == Some(s) {
            teacher_stops.turn.or(teacher_stops.document)
        } else if student_stops.document == Some(s) {
            teacher_stops.document
        } else {
            let text = student.special_text(s);
            let alike = |&t: &u32| text.is_some() && teacher.special_text(t) == text;
            teacher_stops.all.iter().copied().find(alike)
        };
        pairs.push((s, counterpart.unwrap_or(preferred), Rule::Role));
    }
}

/// A special token that is named as a teacher stop, but declared as nothing, goes where that stop
/// is counted: to the stop itself, or to the one that stands for it.
fn named_as_a_stop(
    student: &Vocab,
    teacher: &Vocab,
    options: &Options,
    teacher_stops: &Stops,
    pairs: &mut Vec<Pair>,
) {
    if options.name_similarity > 1.0 {
        return;
    }
    let Some(representative) = teacher_stops.representative(pairs) else {
        return;
    };
    let (named, others): (Vec<_>, Vec<_>) = names(teacher, |_| false)
        .into_iter()
        .partition(|(id, _)| teacher_stops.all.contains(id));
    for (s, name) in names(student, |id| pairs.iter().any(|pair| pair.0 == id)) {
        // `<|turn>` opens what `<turn|>` ends: alike in words, and no stop.
        if others.iter().any(|(_, other)| other.joined == name.joined) {
            continue;
        }
        let alike = named.iter().find(|(_, stop)| stop.joined == name.joined);
        if let Some(&(t, _)) = alike {
            let reached = pairs.iter().any(|pair| pair.1 == t);
            pairs.push((s, if reached { t } else { representative }, Rule::Name));
        }
    }
}

fn plays_another(vocab: &Vocab, role: Role, id: u32) -> bool {
    Role::ALL
        .into_iter()
        .any(|other| other != role && vocab.role(other) == Some(id))
}

/// Pairs what is left one to one, the most similar names first, of equals the lowest ids.
fn by_name(
    student: &Vocab,
    teacher: &Vocab,
    options: &Options,
    teacher_stops: &Stops,
    pairs: &mut Vec<Pair>,
) {
    let threshold = options.name_similarity;
    if threshold > 1.0 {
        return;
    }
    let student: Vec<(u32, Name)> = names(student, |id| pairs.iter().any(|pair| pair.0 == id));
    // A stop that no student stop reaches is counted with one that is.
    let is_stop =
        |id| teacher_stops.all.contains(&id) && teacher_stops.representative(pairs).is_some();
    let teacher: Vec<(u32, Name)> = names(teacher, |id| {
        is_stop(id) || pairs.iter().any(|pair| pair.1 == id)
    });
    let mut candidates: Vec<(f64, usize, usize)> = Vec::new();
    for (s, (_, student_name)) in student.iter().enumerate() {
        for (t, (_, teacher_name)) in teacher.iter().enumerate() {
            let similarity = student_name.similarity(teacher_name);
            if similarity >= threshold {
                candidates.push((similarity, s, t));
            }
        }
    }
    candidates.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut student_free = vec![true; student.len()];
    let mut teacher_free = vec![true; teacher.len()];
    for (_, s, t) in candidates {
        if student_free[s] && teacher_free[t] {
            (student_free[s], teacher_free[t]) = (false, false);
            pairs.push((student[s].0, teacher[t].0, Rule::Name));
        }
    }
}

fn names(vocab: &Vocab, taken: impl Fn(u32) -> bool) -> Vec<(u32, Name)> {
    vocab
        .specials()
        .filter(|&(id, _)| !taken(id))
        .map(|(id, text)| (id, Name::new(text)))
        .filter(|(_, name)| !name.joined.is_empty())
        .collect()
}

/// The words of a special token's text, without brackets, case and order.
struct Name {
    /// All of it in its own order: `end_of_text` is `endoftext`.
    joined: String,
    words: Vec<String>,
    /// `<extra_id_1>` and `<extra_id_2>` are nothing alike.
    numbers: Vec<String>,
}

impl Name {
    fn new(text: &str) -> Self {
        let mut parts: Vec<String> = text
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(str::to_lowercase)
            .collect();
        let joined = parts.concat();
        parts.sort_unstable();
        parts.dedup();
        let (numbers, words) = parts
            .into_iter()
            .partition(|word| word.chars().any(|c| c.is_numeric()));
        Self {
            joined,
            words,
            numbers,
        }
    }

    /// The Jaccard index of the words; 0 where the numbers differ.
    fn similarity(&self, other: &Self) -> f64 {
        if self.joined == other.joined {
            return 1.0;
        }
        if self.numbers != other.numbers {
            return 0.0;
        }
        let common = self
            .words
            .iter()
            .filter(|word| other.words.contains(word))
            .count();
        let all = self.words.len() + other.words.len() - common;
        if all == 0 {
            1.0
        } else {
            common as f64 / all as f64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab::{DummyPrefix, Spelling, VocabBuilder};

    fn vocab(specials: &[&str]) -> Vocab {
        let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
        for special in specials {
            builder.push_special(special).unwrap();
        }
        builder.build()
    }

    #[test]
    fn roles_go_before_names_and_names_pair_one_to_one() {
        let student = vocab(&[
            "<s>",
            "<fim_prefix>",
            "<tool_call>",
            "<extra_id_1>",
            "<odd>",
        ]);
        let teacher = vocab(&[
            "<extra_id_2>",
            "<|begin_of_text|>",
            "<|fim_prefix|>",
            "<|tool_call_begin|>",
            "<extra_id_1>",
        ]);
        let pairs = pair(&student, &teacher, &Options::default());
        assert_eq!(
            pairs,
            [
                (0, 1, Rule::Role),
                (1, 2, Rule::Name),
                (3, 4, Rule::Name),
                (2, 3, Rule::Name)
            ]
        );
    }

    fn targets(student: &Vocab, teacher: &Vocab) -> Vec<(u32, u32)> {
        let mut targets: Vec<(u32, u32)> = pair(student, teacher, &Options::default())
            .into_iter()
            .map(|(s, t, _)| (s, t))
            .collect();
        targets.sort_unstable();
        targets
    }

    #[test]
    fn a_marker_that_plays_several_roles_is_a_stop_first() {
        let mut student = vocab(&["<|end_of_text|>"]);
        for role in [Role::Bos, Role::Eos, Role::Pad, Role::Unk] {
            student.set_role(role, Some(0)).unwrap();
        }
        let teacher = vocab(&["<|begin_of_text|>", "</s>"]);
        assert_eq!(targets(&student, &teacher), [(0, 1)]);
        assert_eq!(targets(&teacher, &student), [(0, 0), (1, 0)]);
    }

    #[test]
    fn a_marker_that_ends_sequences_and_turns_goes_to_the_teachers_end_of_a_turn() {
        let mut student = vocab(&["<|endoftext|>", "<|im_start|>", "<|im_end|>"]);
        student.set_role(Role::Eos, Some(2)).unwrap();
        student.set_role(Role::Pad, Some(0)).unwrap();
        let teacher = vocab(&["<bos>", "<eos>", "<pad>", "<end_of_turn>"]);
        assert_eq!(targets(&student, &teacher), [(0, 2), (2, 3)]);
        let none = Options::default();
        assert_eq!(stop_folds(&teacher, &none, &[2, 3]), [(1, 3)]);
        assert_eq!(stop_folds(&teacher, &none, &[1, 3]), []);
        assert_eq!(stop_folds(&teacher, &none, &[0, 2]), []);
        // A marker that is named as the teacher's unreached stop is counted with it.
        let teacher = vocab(&["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]);
        assert_eq!(targets(&student, &teacher), [(0, 2), (2, 2)]);
        // The other way round both stops have one counterpart.
        assert_eq!(targets(&teacher, &student), [(1, 2), (2, 2)]);
    }

    #[test]
    fn declared_stops_pair_by_preference_by_role_and_by_text() {
        let mut student = vocab(&["<|turn>", "<turn|>", "<eos>", "<|call|>", "<stop>"]);
        student.set_stops(&[1, 2, 3, 4]).unwrap();
        let mut teacher = vocab(&["<|return|>", "<|end|>", "<|call|>", "<|endoftext|>"]);
        teacher.set_stops(&[1, 0, 2]).unwrap();
        assert_eq!(
            targets(&student, &teacher),
            [(1, 1), (2, 3), (3, 2), (4, 1)]
        );
        let none = Options::default();
        assert_eq!(stop_folds(&teacher, &none, &[1, 2, 3]), [(0, 1)]);
    }

    #[test]
    fn a_stop_that_is_text_goes_by_its_bytes_where_the_teacher_has_them() {
        let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
        builder.push_text(b"\n").unwrap();
        builder.push_text(b"<|im_end|>").unwrap();
        builder.push_unused().unwrap();
        let mut student = builder.build();
        student.set_stops(&[1, 0, 2]).unwrap();
        let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
        builder.push_text(b"\n").unwrap();
        builder.push_special("</s>").unwrap();
        assert_eq!(targets(&student, &builder.build()), [(1, 1)]);
    }

    #[test]
    fn names_that_differ_in_brackets_and_word_breaks_alone_are_equal() {
        let same = |a, b| Name::new(a).similarity(&Name::new(b)) == 1.0;
        assert!(same("<|end_of_text|>", "<|endoftext|>"));
        assert!(same("<｜fim▁hole｜>", "<fim_hole>"));
        assert_eq!(Name::new("<a_1>").similarity(&Name::new("<a_2>")), 0.0);
    }

    #[test]
    fn padding_that_is_borrowed_from_another_role_pairs_with_its_like_only() {
        let mut teacher = vocab(&["</s>"]);
        teacher.set_role(Role::Pad, Some(0)).unwrap();
        let student = vocab(&["<pad>", "</s>"]);
        assert_eq!(
            pair(&student, &teacher, &Options::default()),
            [(1, 0, Rule::Role)]
        );
        assert_eq!(
            pair(&teacher, &teacher, &Options::default()),
            [(0, 0, Rule::Role)]
        );
    }

    #[test]
    fn a_declared_pair_replaces_the_role_and_a_role_can_be_ignored() {
        let (student, teacher) = (vocab(&["<s>", "</s>"]), vocab(&["<a>", "<bos>", "<eos>"]));
        let options = Options {
            special_pairs: vec![(0, 0)],
            ignored_roles: vec![Role::Eos],
            ..Options::default()
        };
        assert_eq!(pair(&student, &teacher, &options), [(0, 0, Rule::Role)]);
    }
}
