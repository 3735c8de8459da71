//! Images to maps, as Python sees them: resize, aggregation, anomaly maps.

use numpy::ndarray::{Dimension, Ix2, Ix3};
use numpy::{
    PyArray, PyArray2, PyArray3, PyArrayDyn, PyArrayMethods, PyReadonlyArray2, PyReadonlyArray3, PyReadonlyArray4,
    PyReadonlyArrayDyn, PyUntypedArrayMethods,
};
use patchcore_kernels::aggregate::{Aggregation, MapView, Options};
use patchcore_kernels::anomaly_map::{self, Border, Upsampling};
use patchcore_kernels::geometry::Geometry;
use patchcore_kernels::{resize as resizing, undo_resize as undoing};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::{call, convert};

/// The crop, of all there is unless given, of an image (height, width) or (height, width, channels) that was resized.
#[pyfunction]
#[pyo3(signature = (pixels, resized, offset = [0, 0], crop = None))]
pub(crate) fn resize<'py>(
    py: Python<'py>,
    pixels: PyReadonlyArrayDyn<'py, u8>,
    resized: [usize; 2],
    offset: [usize; 2],
    crop: Option<[usize; 2]>,
) -> PyResult<Bound<'py, PyArrayDyn<u8>>> {
    let (image, channels) = match *pixels.shape() {
        [height, width] => ([height, width], None),
        [height, width, channels] => ([height, width], Some(channels)),
        ref shape => {
            let expected = "pixels must have shape (height, width) or (height, width, channels)";
            return Err(PyValueError::new_err(format!("{expected}; got {shape:?}")));
        }
    };
    let crop = crop.unwrap_or(resized);
    let geometry = Geometry { image, resized, offset, crop };
    let values = convert::slice("pixels", &pixels)?;
    let shape: Vec<_> = crop.into_iter().chain(channels).collect();
    let out = py.import("numpy")?.call_method1("empty", (shape, "uint8"))?.cast_into::<PyArrayDyn<u8>>()?;
    let mut seen = out.readwrite();
    let bytes = seen.as_slice_mut()?;
    call::run(py, Some(1), None, |context| resizing::resize(context, values, channels.unwrap_or(1), geometry, bytes))?;
    drop(seen);
    Ok(out)
}

/// Features, and the rows and columns of patches per image.
type Aggregated<'py> = (Bound<'py, PyArray2<f32>>, (usize, usize));

/// Patch features (patches, width) of maps (images, height, width, channels), and the grid per image.
#[pyfunction]
#[pyo3(signature = (maps, patch_size, stride, width, threads))]
pub(crate) fn aggregate<'py>(
    py: Python<'py>,
    maps: Vec<PyReadonlyArray4<'py, f32>>,
    patch_size: usize,
    stride: usize,
    width: Option<usize>,
    threads: Option<usize>,
) -> PyResult<Aggregated<'py>> {
    let views = maps.iter().map(view).collect::<PyResult<Vec<_>>>()?;
    let options = Options { patch_size, stride, width };
    let aggregation = Aggregation::new(&views, options).map_err(|error| call::to_python(&error))?;
    let features = empty::<Ix2>(py, aggregation.shape())?;
    let mut out = features.readwrite();
    let values = out.as_slice_mut()?;
    call::run(py, threads, None, |context| aggregation.run(context, values))?;
    drop(out);
    Ok((features, aggregation.grid()))
}

/// Anomaly maps (images, height, width) of patch scores (images, rows, columns).
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the signature is Python's")]
#[pyo3(signature = (scores, height, width, sigma, upsampling, border, threads))]
pub(crate) fn anomaly_maps<'py>(
    py: Python<'py>,
    scores: PyReadonlyArray3<'py, f32>,
    height: usize,
    width: usize,
    sigma: f64,
    upsampling: &str,
    border: &str,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray3<f32>>> {
    let upsampling = match upsampling {
        "bilinear" => Upsampling::Bilinear,
        "nearest" => Upsampling::Nearest,
        _ => return Err(choice("upsampling", ["bilinear", "nearest"], upsampling)),
    };
    let border = match border {
        "symmetric" => Border::Symmetric,
        "reflect" => Border::Reflect,
        _ => return Err(choice("border", ["symmetric", "reflect"], border)),
    };
    let options = anomaly_map::Options { height, width, sigma, upsampling, border };
    let shape = [scores.shape()[0], scores.shape()[1], scores.shape()[2]];
    let values = convert::slice("scores", &scores)?;
    let maps = empty::<Ix3>(py, (shape[0], height, width))?;
    let mut out = maps.readwrite();
    let pixels = out.as_slice_mut()?;
    call::run(py, threads, None, |context| anomaly_map::anomaly_maps(context, values, shape, options, pixels))?;
    drop(out);
    Ok(maps)
}

/// The map (height, width) of a crop in the pixels of its image, `unseen` where the crop had cut it off.
#[pyfunction]
#[pyo3(signature = (anomaly_map, image, resized, offset, unseen, threads))]
pub(crate) fn undo_resize<'py>(
    py: Python<'py>,
    anomaly_map: PyReadonlyArray2<'py, f32>,
    image: [usize; 2],
    resized: [usize; 2],
    offset: [usize; 2],
    unseen: f32,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let geometry = Geometry { image, resized, offset, crop: [anomaly_map.shape()[0], anomaly_map.shape()[1]] };
    let values = convert::slice("anomaly_map", &anomaly_map)?;
    let undone = empty::<Ix2>(py, image)?;
    let mut out = undone.readwrite();
    let pixels = out.as_slice_mut()?;
    call::run(py, threads, None, |context| undoing::undo_resize(context, values, geometry, unseen, pixels))?;
    drop(out);
    Ok(undone)
}

fn view<'a>(map: &'a PyReadonlyArray4<'_, f32>) -> PyResult<MapView<'a>> {
    let (n, h, w, c) = map.as_array().dim();
    MapView::new(convert::slice("maps", map)?, [n, h, w, c]).map_err(|error| call::to_python(&error))
}

/// A new array from numpy's allocator, which asks for huge pages where the array is large and leaves
/// the values unset.
fn empty<'py, D: Dimension>(py: Python<'py>, shape: impl IntoPyObject<'py>) -> PyResult<Bound<'py, PyArray<f32, D>>> {
    let array = py.import("numpy")?.call_method1("empty", (shape, "float32"))?;
    Ok(array.cast_into()?)
}

fn choice(name: &str, choices: [&str; 2], got: &str) -> PyErr {
    PyValueError::new_err(format!("{name} must be {:?} or {:?}; got {got:?}", choices[0], choices[1]))
}
