//! Which vector instructions this processor has, and the scalar maths that the compiler vectorises.
//! Knows no tensor and no operation.

/// The widest instruction set that the hot loops are compiled for and the processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The level of this processor; the standard library caches the detection.
#[inline]
pub(crate) fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let has_avx2 = std::is_x86_feature_detected!("avx2")
            && std::is_x86_feature_detected!("fma")
            && std::is_x86_feature_detected!("f16c")
            && std::is_x86_feature_detected!("popcnt");
        if has_avx2 && std::is_x86_feature_detected!("avx512f") {
            return Level::Avx512;
        }
        if has_avx2 {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// Compiles one `#[inline(always)]` body for every level and calls the one that this processor has; given two, the second
/// where multiplying and adding is one instruction.
macro_rules! multiversion {
    ($(#[$meta:meta])* fn $name:ident = $body:ident($($arg:ident : $ty:ty),* $(,)?)) => {
        $crate::simd::multiversion! { $(#[$meta])* fn $name = $body | $body($($arg : $ty),*) }
    };
    ($(#[$meta:meta])* fn $name:ident = $body:ident | $fused:ident($($arg:ident : $ty:ty),* $(,)?)) => {
        $(#[$meta])*
        pub(crate) fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,popcnt")]
            fn avx2($($arg: $ty),*) { $fused($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma,popcnt")]
            fn avx512($($arg: $ty),*) { $fused($($arg),*) }
            match $crate::simd::level() {
                $crate::simd::Level::Portable => $body($($arg),*),
                // SAFETY: `level` returns this variant only where the processor has the features.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: `level` returns this variant only where the processor has the features.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}
pub(crate) use multiversion;

/// Lanes of the accumulators below: one AVX-512 register, two AVX2 registers, four SSE registers.
pub(crate) const LANES: usize = 16;

/// Dot product with [`LANES`] partial sums, so that the order of addition never depends on the level.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for (x, y) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let mut total = 0f32;
    for (x, y) in a_rest.iter().zip(b_rest) {
        total += x * y;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    total + sums[0]
}

/// e^x for x ≤ 0 (softmax numerators), relative error below 2e-7; 0 below -87.
///
/// Cephes' `expf`: x = n ln 2 + r with |r| ≤ ln 2 / 2, a polynomial of degree 5 in r, the exponent set by bits.
/// Written without branches and calls so that the loop around it becomes vector code.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    exp_by::<false>(x)
}

/// [`exp`], with `FUSED` by products and sums in one instruction, which the processor must have: without it each is a call.
#[inline(always)]
pub(crate) fn exp_by<const FUSED: bool>(x: f32) -> f32 {
    let mul_add = |a: f32, b: f32, c: f32| if FUSED { a.mul_add(b, c) } else { a * b + c };
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to the nearest integer.
    let keep = if x < -87.0 { 0.0 } else { 1.0 };
    let x = x.clamp(-87.0, 88.0);
    let shifted = mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add(n, 2.121_944_4e-4, mul_add(n, -0.693_359_4, x));
    let mut poly = 1.987_569_1e-4;
    for term in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        poly = mul_add(poly, r, term);
    }
    let value = mul_add(poly * r, r, r) + 1.0;
    // The low bits of `shifted` are n; a conversion and a checked sum would keep the loop from becoming vector code.
    let exponent = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    value * exponent * keep
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_parts_in_ten_million() {
        let mut x = -86.9f32;
        while x <= 0.0 {
            let exact = f64::from(x).exp();
            for own in [exp(x), exp_by::<true>(x)] {
                assert!(((f64::from(own) - exact) / exact).abs() < 2.5e-7, "x = {x}");
            }
            x += 0.013;
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }
}
