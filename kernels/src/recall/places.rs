//! Room for pages in several layers at once, which threads fill side by side, page by page.
//! Knows neither disk nor query.

#[cfg(feature = "cuda")]
mod cuda;

use super::{MARKS, StoredPages};
use crate::pages::PAGE_TOKENS;
use candle_core::{DType, Result, Tensor, bail};

/// Room behind the pages of several layers, all of one shape and on one device.
///
/// Nothing of it is there before [`Places::finish`]: a layer whose room is let go has the pages that it had.
#[derive(Debug)]
pub struct Places<'a> {
    layers: Vec<&'a mut StoredPages>,
    pages: usize,
}

impl<'a> Places<'a> {
    /// Room for `pages` pages behind those of each of `layers`, which then have at most `limit`.
    ///
    /// # Errors
    /// If they are more than `limit`, the layers are of several shapes or types, or the device has no room.
    pub fn new(mut layers: Vec<&'a mut StoredPages>, pages: usize, limit: usize) -> Result<Self> {
        let of = |layer: &StoredPages| -> Result<_> {
            let (_, g, _, d) = layer.keys.dims4()?;
            Ok((g, d, layer.keys.dtype(), layer.keys.device().location()))
        };
        let first = layers.first().map(|layer| of(layer)).transpose()?;
        for layer in &mut layers {
            if Some(of(layer)?) != first {
                bail!("places: {:?} beside {first:?}, expected layers of one kind", of(layer)?);
            }
            layer.reserve(layer.len() + pages, limit)?;
        }
        Ok(Self { layers, pages })
    }

    /// Writes pages from `at` on, counted from the first that there is room for: threads may write different ones at once.
    ///
    /// Shapes: `numbers` (n, halves, g, PAGE_TOKENS, d) in the type of the pages, of each layer keys before RoPE and then
    /// values, from half `first` on; `landmarks` (n, layers, MARKS, g, d), bf16; both contiguous.
    ///
    /// # Errors
    /// If there are no such pages, shapes, types or devices disagree, or the device fails.
    pub fn put(&self, at: usize, numbers: &Tensor, first: usize, landmarks: &Tensor) -> Result<()> {
        let Some(layer) = self.layers.first() else { return Ok(()) };
        let ((_, g, _, d), count) = (layer.keys.dims4()?, self.layers.len());
        let (n, halves, ..) = numbers.dims5()?;
        if at + n > self.pages
            || halves < first + 2 * count
            || numbers.dims() != [n, halves, g, PAGE_TOKENS, d]
            || landmarks.dims() != [n, count, MARKS, g, d]
            || numbers.dtype() != layer.keys.dtype()
            || landmarks.dtype() != DType::BF16
            || !numbers.is_contiguous()
            || !landmarks.is_contiguous()
        {
            bail!(
                "places: pages from {at} on of {}, keys and values {:?} in {:?} from {first} on, landmarks {:?} in {:?}, expected those of {count} layers of {g} heads of {d}, contiguous",
                self.pages,
                numbers.shape(),
                numbers.dtype(),
                landmarks.shape(),
                landmarks.dtype()
            );
        }
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = layer.keys.device() {
            return cuda::put(device, &self.layers, at, (numbers, first), landmarks);
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let row = layer.first + layer.len + at;
            let half = |half: usize| numbers.narrow(1, half, 1)?.squeeze(1)?.contiguous();
            layer.keys.slice_set(&half(first + 2 * i)?, 0, row)?;
            layer.values.slice_set(&half(first + 2 * i + 1)?, 0, row)?;
            let marks = landmarks.narrow(1, i, 1)?.contiguous()?.reshape((n * MARKS, g, d))?;
            layer.landmarks.slice_set(&marks, 0, row * MARKS)?;
        }
        Ok(())
    }

    /// Says that every page was written: they are the layers' last ones.
    pub fn finish(self) {
        for layer in self.layers {
            layer.len += self.pages;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use std::thread;

    /// Numbers that bf16 holds, of which no two neighbours are alike.
    fn numbers(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let count = shape.iter().product::<usize>();
        let x: Vec<f32> = (0..count).map(|i| (i * 7 % 251) as f32).collect();
        Tensor::from_vec(x, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
    }

    /// Keys, values and landmarks of the pages that are there, as f32.
    fn held(store: &StoredPages) -> Result<Vec<Vec<f32>>> {
        let of = |x: &Tensor, rows: usize| -> Result<Vec<f32>> {
            let x = x.narrow(0, store.first * rows, store.len * rows)?.to_device(&Device::Cpu)?;
            x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
        };
        [(&store.keys, 1), (&store.values, 1), (&store.landmarks, MARKS)]
            .into_iter()
            .map(|(x, rows)| of(x, rows))
            .collect()
    }

    /// Pages that three threads put behind a few that are there, beside the same pages appended.
    fn check((layers, g, d, dtype): (usize, usize, usize, DType), device: &Device) -> Result<()> {
        let new = || -> Result<Vec<StoredPages>> {
            (0..layers).map(|_| StoredPages::new(g, d, dtype, device)).collect()
        };
        let (mut put, mut appended) = (new()?, new()?);
        let (before, pages) = (5, 30);
        let halves = numbers(&[before + pages, 2 * layers, g, PAGE_TOKENS, d], dtype, device)?;
        let marks = numbers(&[before + pages, layers, MARKS, g, d], DType::BF16, device)?;
        let append = |stores: &mut [StoredPages], at: usize| -> Result<()> {
            for (i, store) in stores.iter_mut().enumerate() {
                let half = |half: usize| halves.get(at)?.narrow(0, half, 1);
                store.append(&half(2 * i)?, &half(2 * i + 1)?, &marks.get(at)?.get(i)?, 40)?;
            }
            Ok(())
        };
        for at in 0..before {
            append(&mut put, at)?;
            append(&mut appended, at)?;
        }
        // The first page goes: what comes stands behind those that are left.
        put.iter_mut().chain(&mut appended).for_each(StoredPages::pop_front);
        (before..before + pages).try_for_each(|at| append(&mut appended, at))?;
        let places = Places::new(put.iter_mut().collect(), pages, 40)?;
        // Two at a time, the last ones first; half of a layer that chooses nothing stands before the others.
        let work = |of: usize| {
            (0..pages).step_by(2).rev().filter(|at| at / 2 % 3 == of).try_for_each(|at| {
                let own = halves.narrow(0, before + at, 2)?;
                let own = Tensor::cat(&[&own.narrow(1, 0, 1)?, &own], 1)?;
                places.put(at, &own, 1, &marks.narrow(0, before + at, 2)?)
            })
        };
        thread::scope(|scope| {
            let threads = [0, 1, 2].map(|of| scope.spawn(move || work(of)));
            threads.into_iter().try_for_each(|thread| thread.join().unwrap())
        })?;
        places.finish();
        for (layer, (put, appended)) in put.iter().zip(&appended).enumerate() {
            assert_eq!((put.len(), put.gone()), (appended.len(), appended.gone()));
            assert!(held(put)? == held(appended)?, "layer {layer} of {layers}: {g} heads of {d}");
        }
        Ok(())
    }

    #[test]
    fn pages_that_threads_put_are_those_that_are_appended() -> Result<()> {
        check((3, 2, 16, DType::F32), &Device::Cpu)?;
        check((70, 1, 8, DType::BF16), &Device::Cpu)
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn pages_that_threads_put_on_a_card_are_those_that_are_appended() -> Result<()> {
        let device = match crate::cuda::open(0) {
            Ok(device) => device,
            Err(error) => {
                println!("places: skipped: no CUDA device: {error}");
                return Ok(());
            }
        };
        check((3, 2, 16, DType::F32), &device)?;
        check((70, 1, 8, DType::BF16), &device)?;
        check((27, 3, 64, DType::BF16), &device)
    }

    #[test]
    fn what_is_no_page_of_theirs_is_refused_and_what_is_not_finished_is_not_there() -> Result<()> {
        let new = |d: usize| StoredPages::new(2, d, DType::F32, &Device::Cpu);
        let (mut first, mut second, mut other) = (new(16)?, new(16)?, new(8)?);
        let zeros = |shape: &[usize], dtype: DType| Tensor::zeros(shape, dtype, &Device::Cpu);
        let halves = zeros(&[2, 5, 2, PAGE_TOKENS, 16], DType::F32)?;
        let marks = zeros(&[2, 2, MARKS, 2, 16], DType::BF16)?;
        assert!(Places::new(vec![&mut first, &mut other], 3, 20).is_err());
        assert!(Places::new(vec![&mut first], 21, 20).is_err());
        let places = Places::new(vec![&mut first, &mut second], 3, 20)?;
        assert!(places.put(2, &halves, 1, &marks).is_err());
        assert!(places.put(0, &halves, 2, &marks).is_err());
        assert!(places.put(0, &halves.narrow(0, 0, 1)?, 1, &marks).is_err());
        assert!(places.put(0, &halves.to_dtype(DType::BF16)?, 1, &marks).is_err());
        assert!(places.put(0, &halves, 1, &marks.to_dtype(DType::F32)?).is_err());
        places.put(1, &halves, 1, &marks)?;
        drop(places);
        assert_eq!((first.len(), second.len()), (0, 0));
        Ok(())
    }
}
