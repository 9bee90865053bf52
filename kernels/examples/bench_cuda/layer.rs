//! A transformer layer, attention and gated MLP, forward and training step: plain GQA and FastMKA on the same kernels.
//! The counterpart of `docs/peers/torch_layer.py`, which prints PyTorch's in the same shapes.

use crate::timing::Bench;
use candle_core::{DType, Device, Result, Tensor, Var};
use mka_kernels::tape::ops::{self, Projection, RouteRest};
use mka_kernels::tape::{self, Value};
use mka_kernels::{DenseAttentionParams, RotaryAngles, RouteParams};

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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    router_down: Tensor,
    router_up: Tensor,
    mix: Tensor,
    no_bias: Tensor,
    state: Tensor,
    /// Of all rows, and of those of one stream.
    angles: RotaryAngles,
    row_angles: RotaryAngles,
}

impl Layer {
    /// With `trained` weights a forward pass keeps what the step after it needs.
    fn new(
        shape: LayerShape,
        (b, t): (usize, usize),
        trained: bool,
        device: &Device,
    ) -> Result<Self> {
        let LayerShape { hidden, inner, heads, kv_heads, head_dim, .. } = shape;
        let kept = |x: Tensor| match trained {
            true => Var::from_tensor(&x).map(|x| x.as_tensor().clone()),
            false => Ok(x),
        };
        let weight = |rows: usize, columns: usize| -> Result<Tensor> {
            let scale = 1.0 / (columns as f32).sqrt();
            let weight = Tensor::randn(0f32, scale, (rows, columns), device)?;
            kept(weight.to_dtype(DType::BF16)?)
        };
        let (q_size, kv_size) = (heads * head_dim, kv_heads * head_dim);
        let frequencies: Vec<f64> =
            (0..head_dim / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        Ok(Self {
            shape,
            q: weight(q_size, hidden)?,
            k: weight(kv_size, hidden)?,
            v: weight(kv_size, hidden)?,
            o: weight(hidden, q_size)?,
            gate: weight(inner, hidden)?,
            up: weight(inner, hidden)?,
            down: weight(hidden, inner)?,
            router_down: weight(q_size / 2, q_size)?,
            router_up: weight(1 + RATES.len(), q_size / 2)?,
            mix: kept(Tensor::full(0.5f32, 1, device)?)?,
            state: Tensor::zeros((b, RATES.len(), 2, kv_heads, head_dim), DType::F32, device)?,
            no_bias: Tensor::zeros(q_size / 2, DType::BF16, device)?,
            angles: RotaryAngles::new((0..b).flat_map(|_| 0..t as u64), &frequencies, 1.0),
            row_angles: RotaryAngles::new(0..t as u64, &frequencies, 1.0),
        })
    }

    /// x (b·t, hidden) -> the same; with `routed` keys and values are FastMKA's.
    fn forward(&self, x: &Value, (b, t): (usize, usize), routed: bool) -> Result<Value> {
        let LayerShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (x, normed) = ops::norm(x, None, None, 1e-6)?;
        let (q, k, v) = if routed {
            let groups: [&[Projection]; 2] = [
                &[Projection::plain(&self.q)],
                &[Projection::plain(&self.k), Projection::plain(&self.v)],
            ];
            let mut projected = ops::project(&normed, &groups)?.into_iter();
            let (Some(q), Some(kv)) = (projected.next(), projected.next()) else {
                candle_core::bail!("layer: expected two groups of projections")
            };
            let inner = ops::project_one(&q, Projection::plain(&self.router_down))?;
            let inner = ops::silu_bias(&inner, &self.no_bias)?;
            let logits = ops::cast(
                &ops::project_one(&inner, Projection::plain(&self.router_up))?,
                DType::F32,
            )?;
            let logits = ops::reshape(&logits, (b, t, 1 + RATES.len()))?;
            let kv = ops::reshape(&kv, (b, t, 2, kv_heads, head_dim))?;
            let rest = RouteRest { state: &self.state, gate: &self.mix, bias: None, norm: None };
            let params = RouteParams {
                rates: &RATES,
                seen: 0,
                bias_correction: true,
                eps: 1e-6,
                angles: &self.row_angles,
            };
            let (k, v) = ops::route(&kv, &logits, rest, &params)?;
            (q, k, v)
        } else {
            let groups: [&[Projection]; 3] = [
                &[Projection::plain(&self.q)],
                &[Projection::plain(&self.k)],
                &[Projection::plain(&self.v)],
            ];
            let mut projected = ops::project(&normed, &groups)?.into_iter();
            let (Some(q), Some(k), Some(v)) =
                (projected.next(), projected.next(), projected.next())
            else {
                candle_core::bail!("layer: expected three projections")
            };
            let k = ops::rotated(&ops::reshape(&k, (b * t, kv_heads, head_dim))?, &self.angles)?;
            let heads = |x: &Value| ops::reshape(x, (b, t, kv_heads, head_dim));
            (q, heads(&k)?, heads(&v)?)
        };
        let q = ops::rotated(&ops::reshape(&q, (b * t, heads, head_dim))?, &self.angles)?;
        let q = ops::reshape(&q, (b, t, heads, head_dim))?;
        let params = DenseAttentionParams {
            scale: 1.0 / (head_dim as f32).sqrt(),
            causal: true,
            window: None,
        };
        let attended = ops::attention(&q, &k, &v, &params)?;
        let attended = ops::reshape(&attended, (b * t, heads * head_dim))?;
        let attended = ops::project_one(&attended, Projection::plain(&self.o))?;
        let (x, normed) = ops::norm(&x, Some(&attended), None, 1e-6)?;
        let groups: [&[Projection]; 2] =
            [&[Projection::plain(&self.gate)], &[Projection::plain(&self.up)]];
        let mut projected = ops::project(&normed, &groups)?.into_iter();
        let (Some(gate), Some(up)) = (projected.next(), projected.next()) else {
            candle_core::bail!("layer: expected two projections")
        };
        let inner = ops::silu_mul(&gate, &up)?;
        ops::add(&x, &ops::project_one(&inner, Projection::plain(&self.down))?)
    }
}

pub(crate) fn table(bench: &Bench) -> Result<()> {
    let tokens = bench.tokens();
    println!(
        "bf16, {tokens} tokens a row; ms; FastMKA with rates {RATES:?} and a router of half the query width\n"
    );
    println!("| layer | b x t | pass | GQA | FastMKA | FastMKA / GQA |\n|---|---|---|---|---|---|");
    for shape in SHAPES {
        for t in [2048, 4096, 8192, 16_384, 32_768] {
            let b = tokens / t;
            let named = |pass: &str| format!("{} {b} x {t} {pass}", shape.name);
            if b == 0 || !["forward", "step"].iter().any(|pass| bench.wants(&named(pass))) {
                continue;
            }
            let [layer, frozen] =
                [true, false].map(|trained| Layer::new(shape, (b, t), trained, bench.device()));
            let (layer, frozen) = (layer?, frozen?);
            let x = Tensor::randn(0f32, 1.0, (b * t, shape.hidden), bench.device())?;
            let x = x.to_dtype(DType::BF16)?;
            let forward = |routed: bool| {
                bench
                    .median_of(7, || frozen.forward(&Value::constant(&x), (b, t), routed).map(drop))
            };
            let step = |routed: bool| {
                bench.median_of(7, || {
                    let y = layer.forward(&Value::leaf(&x), (b, t), routed)?;
                    // The loss is the sum, as in PyTorch: by rows first, since one sum of all is one block's work.
                    let _ = y.tensor().sum(1)?.to_dtype(DType::F32)?.sum_all()?;
                    tape::backward(&y, &y.tensor().ones_like()?).map(drop)
                })
            };
            for pass in ["forward", "step"] {
                if !bench.wants(&named(pass)) {
                    continue;
                }
                let (gqa, routed) = match pass {
                    "forward" => (forward(false)?, forward(true)?),
                    _ => (step(false)?, step(true)?),
                };
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
