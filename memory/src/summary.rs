//! A session's running means of its sentence vectors: what it has been about, lately and all along.
//! Knows nothing of text or storage.

use crate::Result;
use crate::format::{self, Kind, StoreRecord};
use crate::vectors::normalize;

/// Decay per sentence: half-lives of about 7, 69 and 693 sentences.
pub(crate) const RATES: [f32; 3] = [0.9, 0.99, 0.999];
/// How much of the fastest mean joins a short question.
const FOLLOW_UP_WEIGHT: f32 = 0.5;
/// A question with fewer content words than this leans on its session.
pub(crate) const FOLLOW_UP_WORDS: usize = 6;
/// What a word of the latest user turn counts in the search by words, against 1 for a word of the question.
pub(crate) const FOLLOW_UP_TERM_WEIGHT: f32 = 0.15;
/// At most so many words of the latest user turn join the search, the rarest first.
pub(crate) const FOLLOW_UP_TERMS: usize = 3;

/// Exponential moving averages in f32, one per rate of [`RATES`].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Summary {
    count: u64,
    means: Vec<Vec<f32>>,
}

impl Summary {
    pub(crate) fn new(dim: usize) -> Self {
        Self { count: 0, means: vec![vec![0.0; dim]; RATES.len()] }
    }

    /// Takes in `rows: (n, dim)`, in order.
    pub(crate) fn push(&mut self, rows: &[f32]) {
        let dim = self.means[0].len();
        for row in rows.chunks_exact(dim) {
            self.count += 1;
            for (mean, rate) in self.means.iter_mut().zip(RATES) {
                for (value, x) in mean.iter_mut().zip(row) {
                    *value = rate * *value + (1.0 - rate) * x;
                }
            }
        }
    }

    /// The mean at `RATES[rate]` without its bias towards the zero it started from; none if nothing went in.
    pub(crate) fn mean(&self, rate: usize) -> Option<Vec<f32>> {
        if self.count == 0 {
            return None;
        }
        let exponent = i32::try_from(self.count).unwrap_or(i32::MAX);
        let weight = 1.0 - f64::from(RATES[rate]).powi(exponent);
        Some(self.means[rate].iter().map(|value| (f64::from(*value) / weight) as f32).collect())
    }

    /// The vector of a short question, turned towards what the session was about just now.
    pub(crate) fn sharpen(&self, query: &mut [f32]) {
        let Some(mean) = self.mean(0) else { return };
        for (value, x) in query.iter_mut().zip(mean) {
            *value += FOLLOW_UP_WEIGHT * x;
        }
        normalize(query);
    }

    /// The payload of a record, with the tag of the embedder whose vectors went in.
    pub(crate) fn encode(&self, embedder: u64) -> Vec<u8> {
        format::encode_summary(embedder, self.count, &self.means)
    }

    /// Reads the payload of a record; none if it is of another shape or of another embedder.
    pub(crate) fn decode(kind: Kind, bytes: &[u8], store: &StoreRecord) -> Result<Option<Self>> {
        let (embedder, count, means) = format::decode_summary(kind, bytes)?;
        let dim = store.dim as usize;
        let fits = embedder.unwrap_or(store.untagged) == store.tag()
            && means.len() == RATES.len()
            && means.iter().all(|mean| mean.len() == dim);
        Ok(fits.then_some(Self { count, means }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_of_one_vector_is_that_vector_at_every_rate() {
        let mut summary = Summary::new(2);
        assert_eq!(summary.mean(0), None);
        summary.push(&[0.6, 0.8]);
        for rate in 0..RATES.len() {
            let mean = summary.mean(rate).unwrap();
            assert!((mean[0] - 0.6).abs() < 1e-4 && (mean[1] - 0.8).abs() < 1e-4, "{mean:?}");
        }
    }

    #[test]
    fn fast_rates_forget_what_slow_rates_keep() {
        let mut summary = Summary::new(2);
        summary.push(&[1.0, 0.0].repeat(50));
        summary.push(&[0.0, 1.0].repeat(50));
        assert!(summary.mean(0).unwrap()[0] < 0.01);
        assert!(summary.mean(2).unwrap()[0] > 0.4);
    }

    #[test]
    fn pushing_at_once_or_apart_is_the_same_and_survives_encoding() {
        let rows: Vec<f32> = (0..60).map(|i| (i as f32).sin()).collect();
        let mut at_once = Summary::new(3);
        at_once.push(&rows);
        let mut apart = Summary::new(3);
        rows.chunks(3).for_each(|row| apart.push(row));
        assert_eq!(at_once, apart);
        let mut store = StoreRecord {
            seed: 0,
            dim: 3,
            embedder: "test".into(),
            next_session: 1,
            purge_pending: false,
            untagged: 0,
        };
        let payload = apart.encode(store.tag());
        let decode = |store: &StoreRecord| Summary::decode(Kind::Summary, &payload, store).unwrap();
        assert_eq!(decode(&store), Some(apart));
        store.embedder = "another".into();
        assert_eq!(decode(&store), None);
        (store.embedder, store.dim) = ("test".into(), 4);
        assert_eq!(decode(&store), None);
    }
}
