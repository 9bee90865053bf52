//! Codes of keys against their formula in f64, and what they tell of scores.

use mka_kernels::key_codes::{
    CENTRE_KEYS, CodeScorer, Rotation, SignTables, coded_bytes, sign_bytes,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| (0..6).map(|_| rng.random_range(-0.7f32..0.7)).sum()).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

fn bf16(bytes: &[u8]) -> f64 {
    f64::from(f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16))
}

/// The estimate of one query and key, read from the bytes as the module says.
fn by_hand(query: &[f32], turned: &[f32], codes: &[u8], key: usize) -> f64 {
    let d = query.len();
    let codes = &codes[key / CENTRE_KEYS * coded_bytes(d)..][..coded_bytes(d)];
    let key = key % CENTRE_KEYS;
    let at_centre: f64 =
        query.iter().zip(codes.chunks(2)).map(|(x, c)| f64::from(*x) * bf16(c)).sum();
    let factor = bf16(&codes[2 * d + 2 * key..]);
    let signs = &codes[2 * d + 2 * CENTRE_KEYS + key * sign_bytes(d)..];
    let sign = |i: usize| if signs[i / 8] >> (i % 8) & 1 == 1 { 1.0 } else { -1.0 };
    at_centre + factor * turned.iter().zip(0..).map(|(x, i)| f64::from(*x) * sign(i)).sum::<f64>()
}

#[test]
fn a_rotation_keeps_products() {
    for d in [1, 7, 64, 128] {
        let rotation = Rotation::new(d);
        let (a, b) = (random(1, d), random(2, d));
        let exact = dot(&a, &b);
        let turned = dot(&rotation.turned(&a), &rotation.turned(&b));
        let size = (dot(&a, &a) * dot(&b, &b)).sqrt();
        assert!((exact - turned).abs() <= 1e-5 * size, "{d}: {turned}, expected {exact}");
    }
}

#[test]
fn scores_equal_their_formula_whatever_the_number_of_queries() {
    for (d, n) in [(8, 1), (10, 2), (64, 3), (96, 1), (128, 2), (256, 1)] {
        let rotation = Rotation::new(d);
        let keys = random(d as u64, n * CENTRE_KEYS * d);
        let mut codes = Vec::new();
        keys.chunks_exact(CENTRE_KEYS * d).for_each(|keys| rotation.code(keys, &mut codes));
        assert_eq!(codes.len(), n * coded_bytes(d));
        for count in [0, 1, 3, 4, 5, 8, 17] {
            let queries = random(7, count * d);
            let turned = rotation.turned(&queries);
            let tables = SignTables::new(&turned, d);
            let stride = n * CENTRE_KEYS + 3;
            let mut scores = vec![f32::NAN; count * stride];
            tables.score(&queries, &codes, &mut scores, stride);
            for query in 0..count {
                let row = |x: &[f32]| x[query * d..(query + 1) * d].to_vec();
                let (own, own_turned) = (row(&queries), row(&turned));
                let scores = &scores[query * stride..(query + 1) * stride];
                for (key, score) in scores[..n * CENTRE_KEYS].iter().enumerate() {
                    let exact = by_hand(&own, &own_turned, &codes, key);
                    let off = (f64::from(*score) - exact).abs();
                    assert!(off <= 1e-5 * d as f64, "{d} {count}: {score}, expected {exact}");
                }
                assert!(scores[n * CENTRE_KEYS..].iter().all(|score| score.is_nan()));
            }
        }
    }
}

#[test]
fn the_fast_scores_are_those_of_the_tables_to_half_a_level_of_each_four_signs() {
    let mut largest = 0f64;
    for (d, n) in [(8, 1), (40, 2), (64, 3), (96, 2), (160, 1), (256, 2), (64, 0)] {
        let rotation = Rotation::new(d);
        let keys = random(d as u64, n * CENTRE_KEYS * d);
        let mut codes = Vec::new();
        keys.chunks_exact(CENTRE_KEYS * d).for_each(|keys| rotation.code(keys, &mut codes));
        for count in [0, 1, 3, 9] {
            let queries = random(9, count * d);
            let turned = rotation.turned(&queries);
            let stride = n * CENTRE_KEYS + 3;
            let (mut fast, mut exact) = (vec![7f32; count * stride], vec![7f32; count * stride]);
            CodeScorer::new(&turned, d).score(&queries, &codes, &mut fast, stride);
            SignTables::new(&turned, d).score(&queries, &codes, &mut exact, stride);
            for query in 0..count {
                let four = |x: &[f32]| x.iter().map(|x| f64::from(x.abs())).sum::<f64>();
                let widest = turned[query * d..(query + 1) * d].chunks(4).map(four);
                let level = 2.0 * widest.fold(0.0, f64::max) / 127.0;
                for key in 0..n * CENTRE_KEYS {
                    let own = &codes[key / CENTRE_KEYS * coded_bytes(d)..];
                    let factor = bf16(&own[2 * d + 2 * (key % CENTRE_KEYS)..]);
                    let at = query * stride + key;
                    let off = (f64::from(fast[at]) - f64::from(exact[at])).abs();
                    let bound = factor * level * (d as f64 / 4.0) / 2.0 + 1e-4;
                    assert!(off <= bound, "{d} {count}: off by {off}, expected {bound} at most");
                    largest = largest.max(off / bound);
                }
                assert!(fast[query * stride..][n * CENTRE_KEYS..stride].iter().all(|x| *x == 7.0));
            }
        }
    }
    println!("the largest error is {largest} of what it may be");
}

#[test]
fn a_score_is_estimated_without_bias_and_within_what_one_bit_leaves() {
    let d = 64;
    let rotation = Rotation::new(d);
    // A part in common, as keys of a model have, and one of their own.
    let common = random(3, d);
    let mut keys = random(4, 16 * CENTRE_KEYS * d);
    keys.chunks_exact_mut(d)
        .for_each(|key| key.iter_mut().zip(&common).for_each(|(x, c)| *x += 4.0 * c));
    let mut codes = Vec::new();
    keys.chunks_exact(CENTRE_KEYS * d).for_each(|keys| rotation.code(keys, &mut codes));
    let query = random(5, d);
    let mut scores = vec![0f32; 16 * CENTRE_KEYS];
    let stride = scores.len();
    SignTables::new(&rotation.turned(&query), d).score(&query, &codes, &mut scores, stride);
    let (mut sum, mut squares, mut own) = (0.0, 0.0, 0.0);
    for (key, score) in keys.chunks_exact(d).zip(&scores) {
        let off = f64::from(*score) - dot(key, &query);
        let part: Vec<f32> = key.iter().zip(&common).map(|(x, c)| x - 4.0 * c).collect();
        (sum, squares, own) = (sum + off, squares + off * off, own + dot(&part, &query).powi(2));
    }
    let (count, bias) = (scores.len() as f64, sum / scores.len() as f64);
    let share = (squares / own).sqrt();
    println!("bias {bias}, error {share} of the deviation of scores");
    // An error of √(π/2 - 1) = 0.76 of the scores' own deviation, but for chance; the mean of 1,024 is 32 times closer.
    assert!((0.65..0.87).contains(&share), "{share}");
    assert!(bias.abs() < 5.0 * (squares / count).sqrt() / count.sqrt(), "{bias}");
}

#[test]
fn a_query_along_a_keys_own_part_is_exact_and_equal_keys_are_their_centre() {
    let d = 64;
    let rotation = Rotation::new(d);
    let mut keys = vec![0f32; CENTRE_KEYS * d];
    let part = random(6, d);
    // Two that cancel in the mean.
    keys[..d].copy_from_slice(&part);
    keys[d..2 * d].iter_mut().zip(&part).for_each(|(x, p)| *x = -p);
    let mut codes = Vec::new();
    rotation.code(&keys, &mut codes);
    let mut scores = vec![0f32; CENTRE_KEYS];
    SignTables::new(&rotation.turned(&part), d).score(&part, &codes, &mut scores, CENTRE_KEYS);
    let exact = dot(&part, &part);
    // A factor of bf16.
    assert!((f64::from(scores[0]) / exact - 1.0).abs() < 1.0 / 200.0, "{}, {exact}", scores[0]);
    assert!((f64::from(scores[1]) / exact + 1.0).abs() < 1.0 / 200.0, "{}, {exact}", scores[1]);
    assert!(scores[2..].iter().all(|score| *score == 0.0));
}
