//! One documented variant for each way a call can fail, with the numbers as fields.

/// What went wrong, what was expected and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A token id lies outside its vocabulary.
    #[error(
        "{side}_ids[{}{position}] = {id} is outside the {side} vocabulary (V = {size}); \
         pass the tokenizer that made these ids",
        sequence.map_or_else(String::new, |sequence| format!("{sequence}, "))
    )]
    IdOutOfRange {
        /// Index of the sequence in its batch.
        sequence: Option<usize>,
        /// `student` or `teacher`.
        side: &'static str,
        /// Index of the id in the array that was passed.
        position: usize,
        /// The id itself.
        id: i64,
        /// Number of ids in the vocabulary.
        size: usize,
    },
    /// A single id that is looked up lies outside the vocabulary.
    #[error("token id {id} is outside the vocabulary (V = {size}); valid ids are 0..{size}")]
    NoSuchId {
        /// The id itself.
        id: i64,
        /// Number of ids in the vocabulary.
        size: usize,
    },
    /// Two arrays that must agree in length do not.
    #[error("{what}: {found} where {expected} was expected; {remedy}")]
    Shape {
        /// The argument, by its name.
        what: String,
        /// The length that was found.
        found: usize,
        /// The length that was expected.
        expected: usize,
        /// What to do.
        remedy: &'static str,
    },
    /// The offsets of a ragged batch do not describe the flat array.
    #[error(
        "{what}[{position}] = {value} is not a valid offset (previous {previous}, flat length {length}); indptr must rise from 0 to the flat length"
    )]
    Indptr {
        /// The argument, by its name.
        what: &'static str,
        /// Index of the bad offset.
        position: usize,
        /// The offset itself.
        value: i64,
        /// The offset before it.
        previous: i64,
        /// Length of the flat array.
        length: usize,
    },
    /// A file that should describe a tokenizer cannot be read as one.
    #[error("cannot read {what}: {reason}; {remedy}")]
    Format {
        /// Which file or section.
        what: &'static str,
        /// What was found in it.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A tokenizer component whose effect on bytes is not known exactly.
    #[error(
        "the tokenizer's {section} is {found:?}, whose effect on bytes is not known exactly; \
         supported are {supported}; build the vocabulary from explicit token bytes instead"
    )]
    Unsupported {
        /// `decoder`, `model`, `pre_tokenizer` or `normalizer`.
        section: &'static str,
        /// The component, by the name that the file gives it.
        found: String,
        /// The components that can be read.
        supported: &'static str,
    },
    /// The tokens are spelled in one alphabet and read in another.
    #[error(
        "the tokenizer is broken: its vocabulary is {found}, but its pipeline is that of \
         {expected}, so spaces are lost; pass the directory or its tokenizer.json instead, or load \
         it with PreTrainedTokenizerFast or a newer transformers"
    )]
    MixedTokenizer {
        /// The alphabet of the vocabulary.
        found: &'static str,
        /// The alphabet that the decoder reads.
        expected: &'static str,
    },
    /// The vocabulary carries no segmentation model, so bytes cannot be tokenized with it.
    #[error(
        "the {side} vocabulary has no tokenization model (it was built from explicit token bytes); \
         build it from a tokenizer.json, a tokenizer object or a rank file"
    )]
    NoModel {
        /// `student`, `teacher` or empty.
        side: &'static str,
    },
    /// The caller gave up before the call was done.
    #[error("the call was interrupted; call again for the answer")]
    Interrupted,
    /// An option has a value outside its range.
    #[error("{name} = {value} is out of range; expected {expected}")]
    Option {
        /// The option, by its argument name.
        name: &'static str,
        /// The value that was passed.
        value: String,
        /// The values that are allowed.
        expected: &'static str,
    },
}

/// An id as an index below `size`.
///
/// # Errors
/// [`Error::NoSuchId`] where it is not.
pub(crate) fn checked_id(id: i64, size: usize) -> Result<u32> {
    u32::try_from(id)
        .ok()
        .filter(|&id| (id as usize) < size)
        .ok_or(Error::NoSuchId { id, size })
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
