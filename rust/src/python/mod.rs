//! The Python extension module `xtoken._core`: parse the arguments, release the GIL, wrap the answer.

mod align;
mod project;
mod trie;
mod vocab;

use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::{Error, Result};

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
            Error::Unsupported { .. } | Error::NoModel { .. } => {
                UnsupportedTokenizerError::new_err(message)
            }
            Error::Option { .. } => OptionError::new_err(message),
        }
    }
}

/// The one door between the languages: runs `work` without the GIL and maps its error.
fn detached<T: Send>(py: Python<'_>, work: impl Send + FnOnce() -> Result<T>) -> PyResult<T> {
    py.detach(work).map_err(PyErr::from)
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
    vocab::register(module)?;
    project::register(module)?;
    trie::register(module)?;
    Ok(())
}
