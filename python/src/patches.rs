//! Patches and conversions of weights as Python gives them.

use std::sync::Arc;

use forebay::device::{DeviceAddr, EightBitSum, Element, Factors, Rounding, StreamHandle};
use forebay::{Bytes, Compute, Computed, Conversion, EightBits, Patch, Product, StoredScale};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::model::Shared;
use crate::run::with_interrupts;

/// A product: the rows it is added to, the addresses of up, down and scale, the factors' elements, their rank, and its terms
/// where it is rounded after each: the elements it is rounded to, their number, the address of their ends, and that of what
/// is multiplied with at last or 0.
pub(crate) type PyProduct = (u32, u32, u64, u64, u64, String, u32, Option<(String, u32, u64, u64)>);
/// How eight-bit elements are rounded: the address of the float32 that they are multiplied with first or 0, the seed of the random
/// bytes and the threads that they are drawn with, and the address and size of memory for them.
type PyRounding = (u64, u64, u64, u64, u64);
/// A patch: the weight's elements, elements a row, the products, what keeps their memory, what computes the weight, and how
/// eight-bit elements are rounded.
pub(crate) type PyPatch = (String, u32, Vec<PyProduct>, Py<PyAny>, Option<Py<PyAny>>, Option<PyRounding>);

/// A callable that gives a weight's address, the handle of the stream that writes it, and what keeps it.
struct PyCompute(Py<PyAny>);

impl Compute for PyCompute {
    fn compute(&self) -> Result<Computed, String> {
        let called = Python::try_attach(|py| {
            let call = || -> PyResult<(u64, u64, Py<PyAny>)> { self.0.bind(py).call0()?.extract() };
            call().map_err(|error| error.to_string())
        });
        let (at, stream, keep) = called.unwrap_or_else(|| Err("the interpreter ends".to_owned()))?;
        // SAFETY: the package passes a stream of torch's on the model's device; torch destroys none of its streams.
        let written_on = unsafe { StreamHandle::from_raw(stream) };
        Ok(Computed { at: DeviceAddr::new(at), written_on, keep: Box::new(keep) })
    }
}

/// The type of an element by its name in torch.
pub(crate) fn element(name: &str) -> PyResult<Element> {
    match name {
        "float32" => Ok(Element::F32),
        "float16" => Ok(Element::F16),
        "bfloat16" => Ok(Element::Bf16),
        "float8_e4m3fn" => Ok(Element::F8E4m3),
        "float8_e5m2" => Ok(Element::F8E5m2),
        name => Err(PyValueError::new_err(format!("is no element that a device computes with: {name}"))),
    }
}

/// A conversion: the stored and the used elements, the scale's address, elements a row or 0 for one scale of all, and what
/// keeps the scale; `None` without.
pub(crate) type PyConversion = (String, String, u64, u64, Option<Py<PyAny>>);

pub(crate) fn conversion((from, to, scale, columns, keep): PyConversion) -> PyResult<Conversion> {
    let at = DeviceAddr::new(scale);
    let scale = match (&keep, columns) {
        (None, _) => StoredScale::None,
        (Some(_), 0) => StoredScale::One(at),
        (Some(_), columns) => StoredScale::Rows { at, columns },
    };
    Ok(Conversion { from: element(&from)?, to: element(&to)?, scale, keep: Arc::new(keep) })
}

pub(crate) fn product(given: PyProduct, columns: u32) -> PyResult<Product> {
    let (first, last, up, down, scale, of, rank, each) = given;
    let [up, down, scale] = [up, down, scale].map(DeviceAddr::new);
    let rounding = match each {
        None => Rounding::Once,
        Some((through, terms, ends, by)) => Rounding::Each {
            through: element(&through)?,
            terms,
            ends: DeviceAddr::new(ends),
            by: (by != 0).then(|| DeviceAddr::new(by)),
        },
    };
    let factors =
        Factors { up, down, scale, element: element(&of)?, rank, columns, row_base: first, rounding };
    Ok(Product { rows: first..last, factors })
}

/// What ``Engine.requantize`` rounds: what a float8 weight stands for, and a product that is added to it. Memory at its addresses is
/// the package's to keep.
#[pyclass(frozen, name = "EightBitSum", module = "forebay._forebay")]
pub(crate) struct PyEightBitSum(pub(crate) EightBitSum);

#[pymethods]
impl PyEightBitSum {
    /// Of the weight at ``source``, times the float32 at ``scale`` if that is not 0.
    #[new]
    fn new(source: u64, element: &str, columns: u32, product: PyProduct, scale: u64) -> PyResult<Self> {
        let product = self::product(product, columns)?;
        let rows = u64::from(product.rows.end.saturating_sub(product.rows.start));
        Ok(PyEightBitSum(EightBitSum {
            from: DeviceAddr::new(source),
            element: self::element(element)?,
            first: 0,
            count: rows * u64::from(columns),
            scale: (scale != 0).then(|| DeviceAddr::new(scale)),
            factors: product.factors,
        }))
    }

    /// The weight's address.
    #[getter]
    fn source(&self) -> u64 {
        self.0.from.get()
    }
}

fn patch((name, columns, products, keep, compute, rounding): PyPatch) -> PyResult<Patch> {
    let products = products.into_iter().map(|given| product(given, columns)).collect::<PyResult<_>>()?;
    let computed = compute.map(|compute| Arc::new(PyCompute(compute)) as Arc<dyn Compute>);
    let rounding = rounding.map(|(scale, seed, threads, random, random_bytes)| EightBits {
        scale: (scale != 0).then(|| DeviceAddr::new(scale)),
        seed,
        threads,
        random: DeviceAddr::new(random),
        random_bytes: Bytes::new(random_bytes),
    });
    Ok(Patch { element: element(&name)?, computed, products, rounding, keep: Arc::new(keep) })
}

/// Gives weights, by number, new patches or none.
pub(crate) fn change(
    py: Python<'_>,
    model: &Shared,
    changes: Vec<(usize, Option<PyPatch>)>,
    stream: StreamHandle,
) -> PyResult<()> {
    let one = |(weight, given): (usize, Option<PyPatch>)| Ok((weight, given.map(patch).transpose()?));
    let changes = changes.into_iter().map(one).collect::<PyResult<Vec<_>>>()?;
    with_interrupts(py, stream, |how| model.attachment.change_patches(changes, how))
}
