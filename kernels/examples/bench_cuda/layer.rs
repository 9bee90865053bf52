//! A transformer layer, attention and gated MLP, forward and training step: plain GQA and FastMKA on the same kernels.
//! The counterpart of `docs/peers/torch_layer.py`, which prints PyTorch's in the same shapes.

use crate::timing::Bench;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use mka_kernels::{
    DenseAttentionParams, RotaryAngles, RouteInputs, RouteParams, attention, rotate, route,
    silu_mul,
};

/// Tokens of every row: batch times length.
const TOKENS: usize = 32_768;
const RATES: [f32; 2] = [0.9, 0.99];

/// Hidden size, width of the MLP, query heads, key/value heads, head dimension.
#[derive(Clone, Copy)]
struct LayerShape {
    name: &'static str,
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// Llama-3.2-1B and Qwen2.5-7B.
const SHAPES: [LayerShape; 2] = [
    LayerShape { name: "1B", hidden: 2048, inner: 8192, heads: 32, kv_heads: 8, head_dim: 64 },
    LayerShape { name: "7B", hidden: 3584, inner: 18_944, heads: 28, kv_heads: 4, head_dim: 128 },
];

/// The layer's weights in bf16, those of the route in f32 where the op takes f32.
struct Layer {
    shape: LayerShape,
    q: Var,
    kv: Var,
    o: Var,
    gate: Var,
    up: Var,
    down: Var,
    router_down: Var,
    router_up: Var,
    mix: Var,
    state: Tensor,
    angles: RotaryAngles,
}

impl Layer {
    fn new(shape: LayerShape, b: usize, t: usize, device: &Device) -> Result<Self> {
        let LayerShape { hidden, inner, heads, kv_heads, head_dim, .. } = shape;
        let weight = |rows: usize, columns: usize| -> Result<Var> {
            let scale = 1.0 / (columns as f32).sqrt();
            let weight = Tensor::randn(0f32, scale, (columns, rows), device)?;
            Var::from_tensor(&weight.to_dtype(DType::BF16)?)
        };
        let (q_size, kv_size) = (heads * head_dim, kv_heads * head_dim);
        let frequencies: Vec<f64> =
            (0..head_dim / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        Ok(Self {
            shape,
            q: weight(q_size, hidden)?,
            kv: weight(2 * kv_size, hidden)?,
            o: weight(hidden, q_size)?,
            gate: weight(inner, hidden)?,
            up: weight(inner, hidden)?,
            down: weight(hidden, inner)?,
            router_down: weight(q_size / 2, q_size)?,
            router_up: weight(1 + RATES.len(), q_size / 2)?,
            mix: Var::from_tensor(&Tensor::full(0.5f32, 1, device)?)?,
            state: Tensor::zeros((b, RATES.len(), 2, kv_heads, head_dim), DType::F32, device)?,
            angles: RotaryAngles::new(0..t as u64, &frequencies, 1.0),
        })
    }

    /// x (b·t, hidden) -> the same; with `routed` keys and values are FastMKA's.
    fn forward(&self, x: &Tensor, (b, t): (usize, usize), routed: bool) -> Result<Tensor> {
        let LayerShape { heads, kv_heads, head_dim, .. } = self.shape;
        let normed = rms_norm(x)?;
        let q = normed.matmul(&self.q)?;
        let kv = normed.matmul(&self.kv)?.reshape((b, t, 2, kv_heads, head_dim))?;
        let (k, v) = if routed {
            let inner = silu(&q.matmul(&self.router_down)?)?;
            let logits = inner.matmul(&self.router_up)?.to_dtype(DType::F32)?;
            let logits = logits.reshape((b, t, 1 + RATES.len()))?;
            let inputs = RouteInputs {
                kv: &kv,
                logits: &logits,
                state: &self.state,
                gate: &self.mix,
                bias: None,
                norm: None,
            };
            let params = RouteParams {
                rates: &RATES,
                seen: 0,
                bias_correction: true,
                eps: 1e-6,
                angles: &self.angles,
            };
            let out = route(&inputs, &params)?;
            (out.keys, out.values)
        } else {
            let k = kv.narrow(2, 0, 1)?.squeeze(2)?;
            (self.rotated(&k.contiguous()?)?, kv.narrow(2, 1, 1)?.squeeze(2)?)
        };
        let q = self.rotated(&q.reshape((b, t, heads, head_dim))?)?;
        let params = DenseAttentionParams {
            scale: 1.0 / (head_dim as f32).sqrt(),
            causal: true,
            window: None,
        };
        let attended = attention(&q, &k, &v, &params)?.reshape((b * t, heads * head_dim))?;
        let x = (x + attended.matmul(&self.o)?)?;
        let normed = rms_norm(&x)?;
        let inner = silu_mul(&normed.matmul(&self.gate)?, &normed.matmul(&self.up)?)?;
        x + inner.matmul(&self.down)?
    }

    /// Stream by stream: the angles are those of one.
    fn rotated(&self, x: &Tensor) -> Result<Tensor> {
        let b = x.dim(0)?;
        let streams: Result<Vec<Tensor>> =
            (0..b).map(|i| rotate(&x.get(i)?, &self.angles)).collect();
        Tensor::stack(&streams?, 0)
    }
}

fn rms_norm(x: &Tensor) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
    wide.broadcast_div(&(mean + 1e-6)?.sqrt()?)?.to_dtype(x.dtype())
}

fn silu(x: &Tensor) -> Result<Tensor> {
    x / (x.neg()?.exp()? + 1.0)?
}

pub(crate) fn table(bench: &Bench) -> Result<()> {
    println!(
        "bf16, {TOKENS} tokens a row; ms; FastMKA with rates {RATES:?} and a router of half the query width\n"
    );
    println!("| layer | b x t | pass | GQA | FastMKA | FastMKA / GQA |\n|---|---|---|---|---|---|");
    for shape in SHAPES {
        for t in [2048, 4096, 8192, 16_384, 32_768] {
            let b = TOKENS / t;
            let layer = Layer::new(shape, b, t, bench.device())?;
            let x = Tensor::randn(0f32, 1.0, (TOKENS, shape.hidden), bench.device())?;
            let x = Var::from_tensor(&x.to_dtype(DType::BF16)?)?;
            let forward = |routed: bool| {
                bench.median_of(7, || layer.forward(&x.detach(), (b, t), routed).map(drop))
            };
            let step = |routed: bool| {
                bench.median_of(7, || {
                    let y = layer.forward(&x, (b, t), routed)?;
                    y.sum_all()?.backward().map(drop)
                })
            };
            for (pass, gqa, routed) in
                [("forward", forward(false)?, forward(true)?), ("step", step(false)?, step(true)?)]
            {
                println!(
                    "| {} | {b} x {t} | {pass} | {:.2} | {:.2} | {:.3} |",
                    shape.name,
                    gqa * 1e3,
                    routed * 1e3,
                    routed / gqa
                );
            }
        }
    }
    Ok(())
}
