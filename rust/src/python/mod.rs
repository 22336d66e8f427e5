//! The Python extension module `xtoken._core`: parse the arguments, release the GIL, wrap the
//! answer.

mod align;
mod arguments;
mod chunks;
mod cross_entropy;
mod exact_kl;
mod ids;
mod losses;
mod prefix_kl;
mod project;
mod sorted;
mod targets;
mod trie;
mod vocab;

use std::cell::RefCell;

use numpy::PyReadonlyArray1;
use pyo3::create_exception;
use pyo3::exceptions::{PyKeyboardInterrupt, PyValueError};
use pyo3::prelude::*;

use crate::error::{Error, Result};
use crate::parallel::Threads;

create_exception!(
    xtoken,
    XTokenError,
    PyValueError,
    "Base of all errors that xtoken raises."
);
create_exception!(
    xtoken,
    TokenIdError,
    XTokenError,
    "A token id lies outside its vocabulary."
);
create_exception!(
    xtoken,
    ShapeError,
    XTokenError,
    "Arrays that must fit together do not."
);
create_exception!(
    xtoken,
    FormatError,
    XTokenError,
    "A file or stored object cannot be read."
);
create_exception!(
    xtoken,
    UnsupportedTokenizerError,
    XTokenError,
    "A tokenizer whose tokens cannot be read exactly as bytes."
);
create_exception!(
    xtoken,
    OptionError,
    XTokenError,
    "An option has a value outside its range."
);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::IdOutOfRange { .. } | Error::NoSuchId { .. } => TokenIdError::new_err(message),
            Error::Shape { .. } | Error::Indptr { .. } => ShapeError::new_err(message),
            Error::Format { .. } => FormatError::new_err(message),
            Error::Unsupported { .. } | Error::MixedTokenizer { .. } | Error::NoModel { .. } => {
                UnsupportedTokenizerError::new_err(message)
            }
            Error::Interrupted => PyKeyboardInterrupt::new_err(message),
            Error::Option { .. } => OptionError::new_err(message),
        }
    }
}

/// The one door between the languages: runs `work` without the GIL and maps its error.
fn detached<T: Send>(py: Python<'_>, work: impl Send + FnOnce() -> Result<T>) -> PyResult<T> {
    py.detach(work).map_err(PyErr::from)
}

/// As [`detached`], for work on several threads or of long duration: Ctrl-C ends it, as whatever
/// the signal's handler raises.
fn interruptible<T: Send>(
    py: Python<'_>,
    threads: usize,
    work: impl Send + FnOnce(&Threads<'_>) -> Result<T>,
) -> PyResult<T> {
    let (result, raised) = py.detach(|| {
        let raised = RefCell::new(None);
        let interrupted = || {
            // An interpreter that shuts down cannot be asked, and nobody waits for the answer.
            let signals = Python::try_attach(|py| py.check_signals());
            let pending = match signals {
                Some(Ok(())) => return false,
                Some(Err(error)) => Some(error),
                None => None,
            };
            raised.replace(pending);
            true
        };
        let result =
            Threads::new(threads).and_then(|threads| work(&threads.interrupted_by(&interrupted)));
        (result, raised.into_inner())
    });
    match raised {
        Some(error) => Err(error),
        None => result.map_err(PyErr::from),
    }
}

/// Borrows an array, which must have no gaps between its elements.
fn contiguous<'a>(name: &'static str, array: &'a PyReadonlyArray1<'_, i64>) -> Result<&'a [i64]> {
    without_gaps(array.as_slice(), name)
}

/// The elements of an array, where there are no gaps between them.
fn without_gaps<T>(
    slice: std::result::Result<T, impl std::fmt::Display>,
    name: &'static str,
) -> Result<T> {
    slice.map_err(|_| Error::Option {
        name,
        value: "an array with gaps between its elements".to_owned(),
        expected: "a contiguous array; pass numpy.ascontiguousarray of it",
    })
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("XTokenError", py.get_type::<XTokenError>())?;
    module.add("TokenIdError", py.get_type::<TokenIdError>())?;
    module.add("ShapeError", py.get_type::<ShapeError>())?;
    module.add("FormatError", py.get_type::<FormatError>())?;
    module.add(
        "UnsupportedTokenizerError",
        py.get_type::<UnsupportedTokenizerError>(),
    )?;
    module.add("OptionError", py.get_type::<OptionError>())?;
    align::register(module)?;
    chunks::register(module)?;
    vocab::register(module)?;
    losses::register(module)?;
    prefix_kl::register(module)?;
    exact_kl::register(module)?;
    cross_entropy::register(module)?;
    sorted::register(module)?;
    project::register(module)?;
    trie::register(module)?;
    targets::register(module)?;
    Ok(())
}
