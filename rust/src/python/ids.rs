//! Token ids in the forms in which callers hold them most, read without a detour.

use std::ops::Range;

use numpy::{
    PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods,
};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

/// One side of a batch. What is in another form, or wrong, is none: `xtoken.align.ids` brings it
/// into one of these, or says what is wrong with it.
pub(super) struct Given<'py> {
    ids: Ids<'py>,
    /// Where each sequence lies in the ids.
    pub(super) ranges: Vec<Range<usize>>,
    /// The column of each sequence's first token in its row.
    pub(super) columns: Vec<i64>,
}

enum Ids<'py> {
    Read(Vec<i64>),
    Flat(PyReadonlyArray1<'py, i64>),
    Rows(PyReadonlyArray2<'py, i64>),
}

impl Given<'_> {
    pub(super) fn ids(&self) -> &[i64] {
        match &self.ids {
            Ids::Read(ids) => ids,
            Ids::Flat(ids) => ids.as_slice().unwrap_or_default(),
            Ids::Rows(ids) => ids.as_slice().unwrap_or_default(),
        }
    }
}

/// A list or tuple of sequences, each a list or tuple of ints or an array.
pub(super) fn sequences<'py>(rows: &Bound<'py, PyAny>) -> Option<Given<'py>> {
    let rows = Items::of(rows)?;
    let mut ids = Vec::new();
    // Room for all of them at once, as to grow is a sixth of the time. One has its own, or needs none.
    if rows.len() > 1 {
        let mut count = 0usize;
        for at in 0..rows.len() {
            count = count.saturating_add(length(&rows.get(at)?)?);
        }
        ids.reserve(count.min(MOST_ROOM));
    }
    let mut ranges = Vec::with_capacity(rows.len());
    for at in 0..rows.len() {
        let row = rows.get(at)?;
        let start = ids.len();
        if let Ok(array) = row.cast::<PyArray1<i64>>() {
            let array = array.try_readonly().ok()?;
            if rows.len() == 1 && array.is_c_contiguous() {
                let ranges = std::iter::once(0..array.len()).collect();
                return Some(flat(array, ranges));
            }
            ids.extend_from_slice(array.as_slice().ok()?);
        } else {
            read_ints(&row, &mut ids)?;
        }
        ranges.push(start..ids.len());
    }
    Some(Given {
        columns: vec![0; ranges.len()],
        ids: Ids::Read(ids),
        ranges,
    })
}

/// One sequence: a list or tuple of ints, or an array.
pub(super) fn one<'py>(ids: &Bound<'py, PyAny>) -> Option<Given<'py>> {
    if let Ok(array) = ids.cast::<PyArray1<i64>>() {
        let array = array.try_readonly().ok()?;
        let ranges = std::iter::once(0..array.as_slice().ok()?.len()).collect();
        return Some(flat(array, ranges));
    }
    let mut read = Vec::new();
    read_ints(ids, &mut read)?;
    Some(Given {
        ranges: std::iter::once(0..read.len()).collect(),
        columns: vec![0],
        ids: Ids::Read(read),
    })
}

/// A flat array with offsets that rise from 0 to its length.
pub(super) fn ragged<'py>(
    ids: &Bound<'py, PyAny>,
    indptr: &Bound<'py, PyAny>,
) -> Option<Given<'py>> {
    let ids = ids.cast::<PyArray1<i64>>().ok()?.try_readonly().ok()?;
    let indptr = indptr.cast::<PyArray1<i64>>().ok()?.try_readonly().ok()?;
    let (length, offsets) = (ids.as_slice().ok()?.len(), indptr.as_slice().ok()?);
    if offsets.first() != Some(&0) || usize::try_from(*offsets.last()?).ok()? != length {
        return None;
    }
    let mut ranges = Vec::with_capacity(offsets.len() - 1);
    for pair in offsets.windows(2) {
        if pair[0] > pair[1] {
            return None;
        }
        // From 0 on and rising.
        ranges.push(pair[0] as usize..pair[1] as usize);
    }
    Some(flat(ids, ranges))
}

/// Padded rows, all of whose columns are tokens or those of a mask of booleans.
pub(super) fn rows<'py>(
    ids: &Bound<'py, PyAny>,
    mask: Option<&Bound<'py, PyAny>>,
) -> Option<Given<'py>> {
    let ids = ids.cast::<PyArray2<i64>>().ok()?.try_readonly().ok()?;
    if !ids.is_c_contiguous() {
        return None;
    }
    let &[count, width] = ids.shape() else {
        return None;
    };
    let mut ranges = Vec::with_capacity(count);
    let mut columns = Vec::with_capacity(count);
    if let Some(mask) = mask {
        let mask = mask.cast::<PyArray2<bool>>().ok()?.try_readonly().ok()?;
        if mask.shape() != ids.shape() {
            return None;
        }
        let flags = mask.as_slice().ok()?;
        for at in 0..count {
            let row = &flags[at * width..(at + 1) * width];
            let first = row.iter().position(|&token| token).unwrap_or(0);
            let padding = row.iter().rev().position(|&token| token);
            let last = padding.map_or(first, |padding| width - padding);
            if !row[first..last].iter().all(|&token| token) {
                return None;
            }
            ranges.push(at * width + first..at * width + last);
            columns.push(first as i64);
        }
    } else {
        ranges.extend((0..count).map(|at| at * width..(at + 1) * width));
        columns.resize(count, 0);
    }
    Some(Given {
        ids: Ids::Rows(ids),
        ranges,
        columns,
    })
}

fn flat(ids: PyReadonlyArray1<'_, i64>, ranges: Vec<Range<usize>>) -> Given<'_> {
    Given {
        columns: vec![0; ranges.len()],
        ids: Ids::Flat(ids),
        ranges,
    }
}

/// More ids than this are given room as they are read: one list may be there many times.
const MOST_ROOM: usize = 1 << 22;

/// Of what may be a sequence.
fn length(row: &Bound<'_, PyAny>) -> Option<usize> {
    if let Ok(array) = row.cast::<PyArray1<i64>>() {
        return Some(array.len());
    }
    Some(Items::of(row)?.len())
}

/// Appends the ints of a list or tuple.
fn read_ints(row: &Bound<'_, PyAny>, ids: &mut Vec<i64>) -> Option<()> {
    let row = Items::of(row)?;
    ids.reserve(row.len());
    for at in 0..row.len() {
        ids.push(row.int(at)?);
    }
    Some(())
}

/// A list or a tuple.
enum Items<'a, 'py> {
    List(&'a Bound<'py, PyList>),
    Tuple(&'a Bound<'py, PyTuple>),
}

impl<'a, 'py> Items<'a, 'py> {
    fn of(value: &'a Bound<'py, PyAny>) -> Option<Self> {
        if let Ok(list) = value.cast::<PyList>() {
            return Some(Self::List(list));
        }
        value.cast::<PyTuple>().ok().map(Self::Tuple)
    }

    fn len(&self) -> usize {
        match self {
            Self::List(list) => list.len(),
            Self::Tuple(tuple) => tuple.len(),
        }
    }

    /// None where the list has become shorter meanwhile.
    fn get(&self, at: usize) -> Option<Bound<'py, PyAny>> {
        match self {
            Self::List(list) => list.get_item(at).ok(),
            Self::Tuple(tuple) => tuple.get_item(at).ok(),
        }
    }

    /// An int of 64 bits; none of another class, as booleans are, which are no ids.
    fn int(&self, at: usize) -> Option<i64> {
        // SAFETY: the interpreter is held, and no code of its users runs between the look at an item
        // and its value, so that it stays in its list. To own it would write to each.
        unsafe {
            let item = match self {
                Self::List(list) => ffi::PyList_GetItem(list.as_ptr(), at as isize),
                Self::Tuple(tuple) => ffi::PyTuple_GetItem(tuple.as_ptr(), at as isize),
            };
            if item.is_null() || ffi::PyLong_CheckExact(item) == 0 {
                ffi::PyErr_Clear();
                return None;
            }
            let value = ffi::PyLong_AsLongLong(item);
            if value == -1 && !ffi::PyErr_Occurred().is_null() {
                ffi::PyErr_Clear();
                return None;
            }
            Some(value)
        }
    }
}
