//! One page to all layers on a CUDA device: parameters of the kernel of `cuda/place_pages.cu`, its launch.

use super::{MARKS, StoredPages};
use crate::cuda::{self, Launch};
use crate::pages::PAGE_TOKENS;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, Result, Tensor};

/// As in `cuda/place_pages.cu`, like the units of a block.
const MOST_LAYERS: usize = 64;
const BLOCK_UNITS: usize = 256 * 4;
/// Of a row of heads of head_dim in bf16, a multiple of 8: every row begins at a multiple of it.
const UNIT: usize = 16;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Place {
    keys: u64,
    values: u64,
    landmarks: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PlaceParams {
    numbers: u64,
    landmarks: u64,
    half: u64,
    marks: u64,
    places: [Place; MOST_LAYERS],
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for PlaceParams {}

/// [`Places::put`](super::Places::put) on `device`; shapes are checked.
pub(super) fn put(
    device: &CudaDevice,
    layers: &[&mut StoredPages],
    at: usize,
    numbers: &Tensor,
    landmarks: &Tensor,
) -> Result<()> {
    let (_, g, _, d) = numbers.dims4()?;
    let half = g * PAGE_TOKENS * d * numbers.dtype().size_in_bytes();
    let marks = MARKS * g * d * landmarks.dtype().size_in_bytes();
    let (numbers, landmarks) = (cuda::address(numbers)?, cuda::address(landmarks)?);
    for (i, layers) in layers.chunks(MOST_LAYERS).enumerate() {
        let before = i * MOST_LAYERS;
        let mut places = [Place::default(); MOST_LAYERS];
        for (place, layer) in places.iter_mut().zip(layers) {
            let row = layer.first + layer.len + at;
            *place = Place {
                keys: cuda::address(&layer.keys)? + (row * half) as u64,
                values: cuda::address(&layer.values)? + (row * half) as u64,
                landmarks: cuda::address(&layer.landmarks)? + (row * marks) as u64,
            };
        }
        let params = PlaceParams {
            numbers: numbers + (2 * before * half) as u64,
            landmarks: landmarks + (before * marks) as u64,
            half: (half / UNIT) as u64,
            marks: (marks / UNIT) as u64,
            places,
        };
        let grid = ((half / UNIT).div_ceil(BLOCK_UNITS) as u32, layers.len() as u32, 3);
        let launch = Launch { grid, block: 256, shared_bytes: 0 };
        cuda::launch(device, "place_pages", "place_page", launch, &params)?;
    }
    Ok(())
}
