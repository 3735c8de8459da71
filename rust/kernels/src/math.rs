//! Functions that are the same bits on every machine.
//!
//! The standard library leaves exp, ln, cos and their like to the C library of the system, whose last bit
//! depends on its version and on the instructions of the CPU. Those of the `libm` crate are additions,
//! multiplications and divisions in Rust, which IEEE 754 defines to the last bit. `clippy.toml` forbids the
//! methods of the standard library; `sqrt` stays, since IEEE 754 defines it too.

pub(crate) use libm::{cos, exp, log as ln, log1p as ln_1p, log2f, pow};

#[cfg(test)]
mod tests {
    #[test]
    fn all_are_those_of_the_standard_library_but_for_the_last_bits() {
        let near = |found: f64, expected: f64, epsilon: f64| {
            assert!((found - expected).abs() <= 2.0 * epsilon * expected.abs(), "{found} {expected}");
        };
        for i in 1..20_000 {
            let x = f64::from(i) * 1e-3;
            near(super::exp(-x), (-x).exp(), f64::EPSILON);
            near(super::cos(x), x.cos(), f64::EPSILON);
            near(super::ln(x), x.ln(), f64::EPSILON);
            near(super::ln_1p(x), x.ln_1p(), f64::EPSILON);
            near(super::pow(x, 0.65), x.powf(0.65), f64::EPSILON);
            near(super::log2f(x as f32).into(), (x as f32).log2().into(), f32::EPSILON.into());
        }
    }
}
