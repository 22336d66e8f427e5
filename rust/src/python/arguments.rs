//! Arguments of the public classes: what is of another class or outside every range is an
//! `XTokenError` that names it.

use std::collections::BTreeMap;

use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyMapping, PyString};

use super::TokenIdError;

/// A token id as it was given; whether the vocabulary has it is asked later.
pub(super) struct TokenId(pub(super) i64);

/// Token ids.
pub(super) struct TokenIds(pub(super) Vec<i64>);

/// Ids by the name of their role; `None` takes one away.
pub(super) struct Roles(pub(super) BTreeMap<String, Option<i64>>);

/// Bytes, borrowed.
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

/// Unicode text.
pub(super) struct Text(pub(super) String);

/// The bytes of each id.
pub(super) struct Tokens(pub(super) Vec<Vec<u8>>);

/// The texts of special ids, by id.
pub(super) struct SpecialTexts(pub(super) BTreeMap<i64, String>);

/// The ids of special tokens, by text.
pub(super) struct SpecialIds(pub(super) BTreeMap<String, u32>);

impl Roles {
    pub(super) const NONE: Self = Self(BTreeMap::new());
}

impl SpecialTexts {
    pub(super) const NONE: Self = Self(BTreeMap::new());
}

/// An `xtoken.errors.ArgumentTypeError`, which is a `TypeError` as well.
fn wrong_type(value: &Bound<'_, PyAny>, expected: &str) -> PyErr {
    let build = || {
        let shown: String = value.repr()?.to_string().chars().take(40).collect();
        let class = value.get_type().name()?;
        let error = value
            .py()
            .import("xtoken.errors")?
            .getattr("ArgumentTypeError")?;
        Ok(PyErr::from_value(error.call1((format!(
            "{shown} is a {class}, expected {expected}"
        ),))?))
    };
    build().unwrap_or_else(|error: PyErr| error)
}

fn token_id(value: &Bound<'_, PyAny>) -> PyResult<i64> {
    if value.is_instance_of::<PyBool>() {
        return Err(wrong_type(value, "a token id, which is an integer"));
    }
    value.extract::<i64>().map_err(|error| {
        if error.is_instance_of::<PyOverflowError>(value.py()) {
            TokenIdError::new_err(format!(
                "token id {value} is outside every vocabulary; valid ids are below 2^32"
            ))
        } else {
            wrong_type(value, "a token id, which is an integer")
        }
    })
}

impl<'py> FromPyObject<'_, 'py> for TokenId {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        token_id(&value).map(Self)
    }
}

impl<'py> FromPyObject<'_, 'py> for TokenIds {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let expected = "a sequence of token ids";
        if value.is_instance_of::<PyString>() || value.is_instance_of::<PyBytes>() {
            return Err(wrong_type(&value, expected));
        }
        let items = value.try_iter().map_err(|_| wrong_type(&value, expected))?;
        items
            .map(|item| token_id(&item?))
            .collect::<PyResult<_>>()
            .map(Self)
    }
}

impl<'py> FromPyObject<'_, 'py> for Roles {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let expected = "a mapping of roles to token ids";
        let mapping = value
            .cast::<PyMapping>()
            .map_err(|_| wrong_type(&value, expected))?;
        let mut roles = BTreeMap::new();
        for item in mapping.items()? {
            let (name, id): (Bound<'_, PyAny>, Bound<'_, PyAny>) = item.extract()?;
            let name = name
                .extract::<String>()
                .map_err(|_| wrong_type(&name, "the name of a role"))?;
            let id = if id.is_none() {
                None
            } else {
                Some(token_id(&id)?)
            };
            roles.insert(name, id);
        }
        Ok(Self(roles))
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Bytes<'a> {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        <&'a [u8] as FromPyObject<'a, 'py>>::extract(value)
            .map(Self)
            .map_err(|_| wrong_type(&value, "bytes; pass a text as text.encode()"))
    }
}

impl<'py> FromPyObject<'_, 'py> for Text {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        value.extract().map(Self).map_err(|_| {
            wrong_type(
                &value,
                "a str of Unicode text; write no half of a character in it",
            )
        })
    }
}

/// `True` or `False`, for `from_py_with`.
pub(super) fn flag(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    value
        .extract()
        .map_err(|_| wrong_type(value, "True or False"))
}

impl<'py> FromPyObject<'_, 'py> for Tokens {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let tokens = value.extract();
        tokens
            .map(Self)
            .map_err(|_| wrong_type(&value, "a sequence of bytes, those of each id"))
    }
}

impl<'py> FromPyObject<'_, 'py> for SpecialTexts {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let texts = value.extract();
        texts
            .map(Self)
            .map_err(|_| wrong_type(&value, "a dict of special token ids to their texts"))
    }
}

impl<'py> FromPyObject<'_, 'py> for SpecialIds {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let ids = value.extract();
        ids.map(Self)
            .map_err(|_| wrong_type(&value, "a dict of texts to token ids below 2^32"))
    }
}
