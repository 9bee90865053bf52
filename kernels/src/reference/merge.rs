//! The merge of two attentions and its gradient by their definitions.
//! Knows nothing of speed.

/// [`crate::merge_states`] of one row: (out, lse). `a`, `b`: values (d) and lse of each state.
pub fn merge_states(a: (&[f64], f64), b: (&[f64], f64)) -> (Vec<f64>, f64) {
    let max = a.1.max(b.1);
    if max == f64::NEG_INFINITY {
        return (vec![0.0; a.0.len()], max);
    }
    let (wa, wb) = ((a.1 - max).exp(), (b.1 - max).exp());
    let out = a.0.iter().zip(b.0).map(|(x, y)| (wa * x + wb * y) / (wa + wb)).collect();
    (out, max + (wa + wb).ln())
}

/// Gradients of [`merge_states`]: of a's values and lse, then of b's.
pub type RowGradients = (Vec<f64>, f64, Vec<f64>, f64);

/// [`crate::merge_states_backward`] of one row, from the gradients `dout` (d) and `dlse` of the result.
pub fn merge_states_backward(
    a: (&[f64], f64),
    b: (&[f64], f64),
    dout: &[f64],
    dlse: f64,
) -> RowGradients {
    let max = a.1.max(b.1);
    if max == f64::NEG_INFINITY {
        return (vec![0.0; dout.len()], 0.0, vec![0.0; dout.len()], 0.0);
    }
    let (wa, wb) = ((a.1 - max).exp(), (b.1 - max).exp());
    let (wa, wb) = (wa / (wa + wb), wb / (wa + wb));
    let dot: f64 = dout.iter().zip(a.0.iter().zip(b.0)).map(|(g, (x, y))| g * (x - y)).sum();
    (
        dout.iter().map(|g| wa * g).collect(),
        wa * wb * dot + wa * dlse,
        dout.iter().map(|g| wb * g).collect(),
        -wa * wb * dot + wb * dlse,
    )
}
