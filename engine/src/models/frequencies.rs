//! Inverse frequencies of RoPE and the scalings that stretch them to longer contexts.
//! Knows no stream and no tensor; everything is f64.

use mka_kernels::RotaryAngles;
use std::f64::consts::PI;
use std::sync::Arc;

/// How a model's RoPE was stretched after its first training.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum RopeScaling {
    None,
    /// Positions divided by a factor (arXiv 2306.15595).
    Linear {
        factor: f64,
    },
    /// Llama 3.1's piecewise scaling: long wavelengths divided, short kept, a smooth ramp between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_tokens: usize,
    },
    /// YaRN (arXiv 2309.00071), sections 3.2 and 3.4.
    Yarn {
        factor: f64,
        original_tokens: usize,
        beta_fast: f64,
        beta_slow: f64,
        attention_factor: Option<f64>,
        mscale: Option<f64>,
        mscale_all_dim: Option<f64>,
        truncate: bool,
    },
    /// LongRoPE (arXiv 2402.13753): every frequency divided by a factor of its own.
    LongRope {
        /// Of the pairs in their order; empty where they are a tensor of the checkpoint, as in GGUF files.
        factors: Vec<f64>,
        /// Whether they are those for streams beyond the original length.
        is_long: bool,
        /// On cosines and sines.
        scale: f64,
    },
}

impl RopeScaling {
    /// YaRN with the paper's constants.
    pub(crate) fn yarn(factor: f64, original_tokens: usize) -> Self {
        Self::Yarn {
            factor,
            original_tokens,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        }
    }
}

/// The frequencies of one model and the factor on its cosines and sines.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frequencies {
    /// head_dim / 2 inverse frequencies, radians a token.
    pub(crate) inv_freq: Vec<f64>,
    /// 1.0 but for YaRN and LongRoPE, whose attention temperature is folded into cos and sin.
    pub(crate) scale: f64,
}

impl Frequencies {
    /// Cosines and sines of `positions`.
    pub(crate) fn angles(&self, positions: impl IntoIterator<Item = u64>) -> RotaryAngles {
        RotaryAngles::new(positions, &self.inv_freq, self.scale)
    }

    /// The same over heads of `head_dim`, of which the first frequencies turn a part and nothing the rest.
    pub(crate) fn over(mut self, head_dim: usize) -> Self {
        self.inv_freq.resize(head_dim / 2, 0.0);
        self
    }

    /// Every frequency divided by its own of `divisors`.
    pub(crate) fn divided(mut self, divisors: impl IntoIterator<Item = f64>) -> Self {
        self.inv_freq.iter_mut().zip(divisors).for_each(|(freq, divisor)| *freq /= divisor);
        self
    }

    pub(crate) fn new(theta: f64, head_dim: usize, scaling: &RopeScaling) -> Self {
        let base = |i: usize| theta.powf(-((2 * i) as f64) / head_dim as f64);
        let plain: Vec<f64> = (0..head_dim / 2).map(base).collect();
        match *scaling {
            RopeScaling::None => Self { inv_freq: plain, scale: 1.0 },
            RopeScaling::Linear { factor } => {
                Self { inv_freq: plain.into_iter().map(|f| f / factor).collect(), scale: 1.0 }
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_tokens } => {
                let original = original_tokens as f64;
                let (longest, shortest) = (original / low_freq_factor, original / high_freq_factor);
                let stretch = |freq: f64| {
                    let wavelength = 2.0 * PI / freq;
                    if wavelength < shortest {
                        freq
                    } else if wavelength > longest {
                        freq / factor
                    } else {
                        let smooth = (original / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * freq / factor + smooth * freq
                    }
                };
                Self { inv_freq: plain.into_iter().map(stretch).collect(), scale: 1.0 }
            }
            RopeScaling::Yarn {
                factor,
                original_tokens,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate,
            } => {
                // The dimension whose wavelength makes `rotations` turns over the original context.
                let dimension = |rotations: f64| {
                    head_dim as f64 * (original_tokens as f64 / (rotations * 2.0 * PI)).ln()
                        / (2.0 * theta.ln())
                };
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                low = low.max(0.0);
                high = high.min(head_dim as f64 - 1.0);
                if low == high {
                    high += 0.001;
                }
                let inv_freq = plain.into_iter().enumerate().map(|(i, freq)| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    freq / factor * ramp + freq * (1.0 - ramp)
                });
                let temperature = |mscale: f64| match factor > 1.0 {
                    true => 0.1 * mscale * factor.ln() + 1.0,
                    false => 1.0,
                };
                let scale = match (attention_factor, mscale, mscale_all_dim) {
                    (Some(scale), _, _) => scale,
                    (None, Some(one), Some(all)) if one != 0.0 && all != 0.0 => {
                        temperature(one) / temperature(all)
                    }
                    _ => temperature(1.0),
                };
                Self { inv_freq: inv_freq.collect(), scale }
            }
            RopeScaling::LongRope { ref factors, scale, .. } => {
                Self { inv_freq: plain, scale }.divided(factors.iter().copied())
            }
        }
    }
}

/// The frequencies that each layer rotates by. Most models have one set for all of them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LayerFrequencies {
    sets: Vec<Frequencies>,
    /// Of each layer its place in `sets`.
    of_layer: Arc<[usize]>,
}

impl LayerFrequencies {
    /// `sets[of_layer[i]]` for layer i.
    pub(crate) fn new(sets: Vec<Frequencies>, of_layer: Vec<usize>) -> Self {
        debug_assert!(of_layer.iter().all(|set| *set < sets.len()));
        Self { sets, of_layer: of_layer.into() }
    }

    /// One set for every layer.
    #[cfg(test)]
    pub(crate) fn uniform(set: Frequencies, num_layers: usize) -> Self {
        Self::new(vec![set], vec![0; num_layers])
    }

    /// Cosines and sines of `positions` for every layer.
    pub(crate) fn angles(&self, positions: impl IntoIterator<Item = u64> + Clone) -> LayerAngles {
        let sets = self.sets.iter().map(|set| set.angles(positions.clone())).collect();
        LayerAngles { sets, of_layer: self.of_layer.clone() }
    }
}

/// Cosines and sines of the same positions, by layer.
#[derive(Debug, Clone)]
pub(crate) struct LayerAngles {
    sets: Vec<RotaryAngles>,
    of_layer: Arc<[usize]>,
}

impl LayerAngles {
    /// Those of `layer`.
    pub(crate) fn of(&self, layer: usize) -> &RotaryAngles {
        &self.sets[self.of_layer[layer]]
    }

    /// How many positions there are.
    pub(crate) fn len(&self) -> usize {
        self.sets.first().map_or(0, RotaryAngles::len)
    }
}
