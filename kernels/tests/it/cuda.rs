//! The CUDA side of every op against its f64 reference. Skipped, with the reason printed, where there is no device.

mod attention;
mod decode;
mod elementwise;
mod flash;
mod packed;
mod paged;
mod projected;
mod recall;
mod rope;
mod route;
mod select;
mod tape;

use candle_core::Device;

/// The device, its outputs poisoned; None, with a line that says so, where there is none.
fn device(test: &str) -> Option<Device> {
    mka_kernels::cuda::poison_outputs(true);
    match mka_kernels::cuda::open(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("{test}: skipped: no CUDA device: {error}");
            None
        }
    }
}
