//! Pages to all layers on a CUDA device: parameters of the kernel of `cuda/place_pages.cu`, its launch.

use super::{MARKS, StoredPages};
use crate::cuda::{self, Launch};
use crate::pages::PAGE_TOKENS;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, Result, Tensor};

/// As in `cuda/place_pages.cu`, like the units of a block.
const MOST_LAYERS: usize = 64;
const BLOCK_UNITS: usize = 256 * 4;
/// Keys, values and landmarks of a page each along the last dimension of the grid, which is 65,535 at most.
const MOST_PAGES: usize = 65_535 / 3;
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
    page: u64,
    marks_page: u64,
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
    (numbers, first): (&Tensor, usize),
    landmarks: &Tensor,
) -> Result<()> {
    let (n, halves, g, _, d) = numbers.dims5()?;
    let half = g * PAGE_TOKENS * d * numbers.dtype().size_in_bytes();
    let marks = MARKS * g * d * landmarks.dtype().size_in_bytes();
    let (page, marks_page) = (halves * half, layers.len() * marks);
    let (numbers, landmarks) = (cuda::address(numbers)?, cuda::address(landmarks)?);
    for from in (0..n).step_by(MOST_PAGES) {
        let count = (n - from).min(MOST_PAGES);
        for (i, layers) in layers.chunks(MOST_LAYERS).enumerate() {
            let before = i * MOST_LAYERS;
            let mut places = [Place::default(); MOST_LAYERS];
            for (place, layer) in places.iter_mut().zip(layers) {
                let row = layer.first + layer.len + at + from;
                *place = Place {
                    keys: cuda::address(&layer.keys)? + (row * half) as u64,
                    values: cuda::address(&layer.values)? + (row * half) as u64,
                    landmarks: cuda::address(&layer.landmarks)? + (row * marks) as u64,
                };
            }
            let params = PlaceParams {
                numbers: numbers + (from * page + (first + 2 * before) * half) as u64,
                landmarks: landmarks + (from * marks_page + before * marks) as u64,
                page: (page / UNIT) as u64,
                marks_page: (marks_page / UNIT) as u64,
                half: (half / UNIT) as u64,
                marks: (marks / UNIT) as u64,
                places,
            };
            let blocks = (half / UNIT).div_ceil(BLOCK_UNITS) as u32;
            let grid = (blocks, layers.len() as u32, 3 * count as u32);
            let launch = Launch { grid, block: 256, shared_bytes: 0 };
            cuda::launch(device, "place_pages", "place_pages", launch, &params)?;
        }
    }
    Ok(())
}
