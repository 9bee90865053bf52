//! A BERT encoder over flat rows: the token ids of some texts in, their unit vectors out.
//! Knows no file, tokenizer or store.
//!
//! Source: BERT (arXiv 1810.04805); pooling and normalisation as in sentence-transformers, `models/Pooling.py`.

use mka_kernels::PanelLinear;
use mka_kernels::encoder::{add_and_norm, attend_text, gelu};

/// Weight and bias of a layer norm, (c) each.
pub(super) struct Norm {
    pub(super) weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
}

/// Of which of a text's last hidden states its vector is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pooling {
    /// Their mean.
    Mean,
    /// The first token's, `[CLS]`.
    Cls,
}

pub(super) struct Layer {
    /// Query, key and value, one above the other.
    pub(super) inputs: PanelLinear,
    pub(super) attention_out: PanelLinear,
    pub(super) attention_norm: Norm,
    pub(super) intermediate: PanelLinear,
    pub(super) output: PanelLinear,
    pub(super) output_norm: Norm,
}

/// The weights of an encoder; `c` is the hidden size.
pub(super) struct Encoder {
    pub(super) heads: usize,
    pub(super) eps: f32,
    /// (vocabulary, c).
    pub(super) words: Vec<f32>,
    /// (positions, c).
    pub(super) positions: Vec<f32>,
    /// (c): that of the first kind of token, the only one in a single text.
    pub(super) kind: Vec<f32>,
    pub(super) norm: Norm,
    pub(super) layers: Vec<Layer>,
    pub(super) pooling: Pooling,
}

/// The activations of a batch, kept from one to the next.
#[derive(Default)]
pub(super) struct Room {
    x: Vec<f32>,
    inputs: Vec<f32>,
    mixed: Vec<f32>,
    inner: Vec<f32>,
    out: Vec<f32>,
}

impl Encoder {
    /// The ids of some texts -> their unit vectors, (texts, c). Every id has a word, and no text more tokens than there
    /// are positions.
    ///
    /// Every token goes through the matrices with all others; only attention and pooling are a text's own. So texts of
    /// any lengths share a batch without padding.
    pub(super) fn encode(&self, texts: &[Vec<u32>], room: &mut Room) -> Vec<f32> {
        let c = self.kind.len();
        let Room { x, inputs, mixed, inner, out } = room;
        let num_tokens: usize = texts.iter().map(Vec::len).sum();
        x.clear();
        out.clear();
        for text in texts {
            for (id, position) in text.iter().zip(self.positions.chunks_exact(c)) {
                x.extend_from_slice(&self.words[*id as usize * c..][..c]);
                out.extend(position.iter().zip(&self.kind).map(|(position, kind)| position + kind));
            }
        }
        self.norm.apply(x, out, self.eps);
        for layer in &self.layers {
            apply(&layer.inputs, x, inputs);
            mixed.resize(num_tokens * c, 0.0);
            let (mut from, mut to) = (&inputs[..], &mut mixed[..]);
            for text in texts {
                let qkv = from.split_off(..text.len() * 3 * c).expect("tokens of every text");
                let own = to.split_off_mut(..text.len() * c).expect("tokens of every text");
                attend_text(qkv, self.heads, c / self.heads, own);
            }
            apply(&layer.attention_out, mixed, out);
            layer.attention_norm.apply(x, out, self.eps);
            apply(&layer.intermediate, x, inner);
            gelu(inner);
            apply(&layer.output, inner, out);
            layer.output_norm.apply(x, out, self.eps);
        }
        let mut vectors = vec![0.0; texts.len() * c];
        let mut rows = x.chunks_exact(c);
        for (text, vector) in texts.iter().zip(vectors.chunks_exact_mut(c)) {
            let pooled = match self.pooling {
                Pooling::Mean => text.len(),
                Pooling::Cls => 1,
            };
            for (at, row) in rows.by_ref().take(text.len()).enumerate() {
                if at < pooled {
                    vector.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
            }
            // The mean and the sum have one direction.
            let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            vector.iter_mut().for_each(|x| *x /= norm);
        }
        vectors
    }
}

impl Norm {
    fn apply(&self, x: &mut [f32], added: &[f32], eps: f32) {
        add_and_norm(x, added, &self.weight, &self.bias, eps);
    }
}

/// The layer over all rows of x, into `out`, which gets the length of the result.
fn apply(layer: &PanelLinear, x: &[f32], out: &mut Vec<f32>) {
    out.resize(x.len() / layer.cols() * layer.rows(), 0.0);
    layer.apply(x, out);
}
