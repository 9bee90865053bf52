//! The device of a model, which is let go as long as its card works.
//! Knows no weight.

use candle_core::Device;
use std::mem::ManuallyDrop;
use std::ops::Deref;

/// A device as the model holds it that runs there.
///
/// With its last copy a CUDA device gives back what cuBLAS and cuRAND handed out, and panics if they refuse; after a fault
/// the driver refuses everything. Such a device stays open to the end of the process.
pub(crate) struct ModelDevice(Device);

impl ModelDevice {
    pub(crate) fn new(device: &Device) -> Self {
        Self(device.clone())
    }
}

impl Deref for ModelDevice {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.0
    }
}

impl Drop for ModelDevice {
    fn drop(&mut self) {
        // Whoever holds another copy has no work of this model under way once the device has come to rest.
        if self.0.is_cuda()
            && let Err(error) = self.0.synchronize()
        {
            tracing::warn!(%error, "the card failed: its device stays open to the end of the process");
            let _ = ManuallyDrop::new(self.0.clone());
        }
    }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
    use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
    use candle_core::{DType, Tensor};
    use std::process::Command;

    /// Set for the process whose card is to fail: nothing runs there afterwards.
    const CHILD: &str = "MKA_TEST_CARD_FAULT";

    const FAULT: &str = ".version 7.0\n.target sm_80\n.address_size 64\n\
        .visible .entry fault()\n{\n\ttrap;\n}\n";

    /// Has the card fail for this process.
    fn fail(device: &Device) {
        let stream = device.as_cuda_device().unwrap().cuda_stream();
        let module = stream.context().load_module(Ptx::from_src(FAULT)).unwrap();
        let function = module.load_function("fault").unwrap();
        // SAFETY: the kernel has no argument and touches no memory.
        unsafe { stream.launch_builder(&function).launch(LaunchConfig::for_num_elems(1)) }.unwrap();
        assert!(device.synchronize().is_err());
    }

    #[test]
    fn a_model_on_a_card_that_failed_is_dropped_without_a_panic() {
        let device = match mka_kernels::cuda::open(0) {
            Ok(device) => device,
            Err(error) => {
                println!("a card that failed: skipped: no CUDA device: {error}");
                return;
            }
        };
        if std::env::var_os(CHILD).is_some() {
            let numbers = Tensor::zeros(5, DType::F32, &device).unwrap();
            let model = ModelDevice::new(&device);
            fail(&device);
            drop((model, numbers, device));
            println!("\ndropped");
            return;
        }
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("models::device::tests::a_model_on_a_card_that_failed_is_dropped_without_a_panic")
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let said =
            format!("{}\n{text}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.lines().any(|line| line == "dropped"), "{said}");
    }
}
