//! float16 as a way to store rows: IEEE binary16, rounded to nearest, ties to even.

/// The largest magnitude that does not round to infinity lies just below this.
pub const LIMIT: f32 = 65_520.0;

/// A float16, as its bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Half(pub u16);

impl Half {
    /// The nearest float16 of a finite value below [`LIMIT`] in magnitude.
    pub fn new(value: f32) -> Self {
        let sign = (value.to_bits() >> 16) as u16 & 0x8000;
        let magnitude = value.abs();
        let bits = if magnitude < 6.103_515_6e-5 {
            // Subnormal: next to 1/2 the last bit of an f32 is 2⁻²⁴, that of a float16, and the sum is rounded to it.
            (magnitude + 0.5).to_bits() - 0.5_f32.to_bits()
        } else {
            // The exponent's bias goes from 127 to 15; 13 bits of mantissa are rounded off.
            let bits = magnitude.to_bits() - ((127 - 15) << 23);
            (bits + 0xfff + ((bits >> 13) & 1)) >> 13
        };
        Self(sign | bits as u16)
    }

    /// The value, exactly.
    pub fn to_f32(self) -> f32 {
        let bits = u32::from(self.0);
        let (sign, exponent, mantissa) = ((bits & 0x8000) << 16, (bits >> 10) & 0x1f, bits & 0x3ff);
        let magnitude = match exponent {
            0 => mantissa as f32 / 16_777_216.0,
            0x1f => f32::from_bits(0x7f80_0000 | (mantissa << 13)),
            _ => f32::from_bits(((exponent + 127 - 15) << 23) | (mantissa << 13)),
        };
        f32::from_bits(magnitude.to_bits() | sign)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float16_survives_the_way_there_and_back() {
        for bits in (0..=u16::MAX).filter(|bits| bits & 0x7c00 != 0x7c00) {
            let half = Half(bits);
            assert_eq!(Half::new(half.to_f32()), half, "{bits:#x}");
        }
    }

    #[test]
    fn values_between_go_to_the_nearest_and_ties_to_even() {
        for bits in 0..0x7bff_u16 {
            let (low, high) = (Half(bits).to_f32(), Half(bits + 1).to_f32());
            let middle = f32::midpoint(low, high);
            assert_eq!(Half::new(middle).0, bits + (bits & 1), "the middle above {bits:#x}");
            assert_eq!(Half::new(middle.next_down()).0, bits);
            assert_eq!(Half::new(middle.next_up()).0, bits + 1);
        }
        assert_eq!(Half::new(LIMIT.next_down()).to_f32(), 65_504.0);
        assert_eq!(Half::new(-1.0).to_f32(), -1.0);
        assert_eq!(Half(1).to_f32(), 2.0_f32.powi(-24));
    }
}
