//! Dense attention and its gradients on the device, over the grid of the CPU's tests.

use super::device;
use crate::flash::{CASES, Case, Inputs, check, check_graph, elements};
use candle_core::{DType, Result, Tensor};
use mka_kernels::{attention_backward, attention_forward};

#[test]
fn dense_attention_on_the_device_is_as_exact_as_its_type() -> Result<()> {
    let Some(gpu) = device("dense attention") else { return Ok(()) };
    for case in CASES {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            check(case, dtype, &gpu)?;
        }
    }
    Ok(())
}

#[test]
fn every_head_dim_has_every_kernel() -> Result<()> {
    let Some(gpu) = device("dense attention, head_dim") else { return Ok(()) };
    for d in [32, 64, 96, 128, 160, 256] {
        // Two tiles and a rest of queries and of keys, each of another length.
        let case = Case { shape: [1, 270, 290, 2, 1, d], ..CASES[1] };
        check(&case, DType::F32, &gpu)?;
        if d != 32 && d != 160 {
            check(&case, DType::BF16, &gpu)?;
            check(&case, DType::F16, &gpu)?;
        }
    }
    let x = Tensor::zeros((1, 4, 1, 80), DType::BF16, &gpu)?;
    let refused = attention_forward(&x, &x, &x, &Inputs::new(&CASES[0], DType::F32).params);
    assert!(refused.map(drop).expect_err("refused").to_string().contains("head_dim 80"));
    Ok(())
}

#[test]
fn a_block_of_keys_walks_all_query_heads_of_its_group_where_blocks_are_many() -> Result<()> {
    let Some(gpu) = device("dense attention, many blocks") else { return Ok(()) };
    for d in [64, 128] {
        // 528 blocks of keys, from which on query heads are not split; two tiles of rows of each head.
        let case = Case { shape: [264, 70, 3, 4, 2, d], causal: false, window: None };
        check(&case, DType::BF16, &gpu)?;
    }
    Ok(())
}

#[test]
fn gradients_have_the_same_bits_twice() -> Result<()> {
    let Some(gpu) = device("gradients twice") else { return Ok(()) };
    for d in [64, 96, 128] {
        let case = Case { shape: [2, 700, 700, 4, 2, d], ..CASES[1] };
        let inputs = Inputs::new(&case, DType::BF16);
        let [q, k, v, dout, _] = inputs.tensors(DType::BF16, &gpu)?;
        let (out, lse) = attention_forward(&q, &k, &v, &inputs.params)?;
        let run = || -> Result<Vec<Vec<f64>>> {
            let (dq, dk, dv) =
                attention_backward(&q, &k, &v, &out, &lse, &dout, None, &inputs.params)?;
            [&dq, &dk, &dv].into_iter().map(elements).collect()
        };
        assert_eq!(run()?, run()?, "head_dim {d}");
    }
    Ok(())
}

#[test]
fn gradients_through_the_graph_on_the_device_are_those_of_the_function() -> Result<()> {
    let Some(gpu) = device("gradients of dense attention") else { return Ok(()) };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        check_graph(dtype, &gpu)?;
    }
    Ok(())
}

#[test]
fn inputs_at_odd_addresses_are_copied_first() -> Result<()> {
    let Some(gpu) = device("dense attention, odd addresses") else { return Ok(()) };
    let inputs = Inputs::new(&CASES[1], DType::BF16);
    let [q, k, v, ..] = inputs.tensors(DType::BF16, &gpu)?;
    let (expected, _) = attention_forward(&q, &k, &v, &inputs.params)?;
    let shifted = |x: &Tensor| -> Result<Tensor> {
        let n = x.elem_count();
        let one = Tensor::zeros(1, DType::BF16, &gpu)?;
        Tensor::cat(&[&one, &x.flatten_all()?], 0)?.narrow(0, 1, n)?.reshape(x.shape())
    };
    let (got, _) = attention_forward(&shifted(&q)?, &shifted(&k)?, &shifted(&v)?, &inputs.params)?;
    assert_eq!(elements(&expected)?, elements(&got)?);
    Ok(())
}
