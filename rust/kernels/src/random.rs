//! The one source of randomness: a hash of a seed and a position, so that a draw depends on nothing else.

/// Sebastiano Vigna's `SplitMix64`: the output for `state`, which is also a fine hash of it.
pub fn splitmix64(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number in [−1, 1), from the same hash.
pub(crate) fn uniform(state: u64) -> f32 {
    (splitmix64(state) >> 40) as f32 / 8_388_608.0 - 1.0
}

/// Rows of a few directions and a little noise, as the features of a network: codes tell them apart.
#[cfg(test)]
pub(crate) fn features(rows: usize, cols: usize) -> Vec<f32> {
    let value = |row: usize, col: usize| -> f32 {
        let share = |i: usize| uniform((row * 6 + i) as u64) * uniform((100_000 + i * cols + col) as u64);
        (0..6).map(share).sum::<f32>() + 0.02 * uniform((200_000 + row * cols + col) as u64)
    };
    (0..rows * cols).map(|i| value(i / cols, i % cols)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_is_the_published_sequence() {
        // The first outputs of the reference generator seeded with 1234567.
        let increment = 0x9e37_79b9_7f4a_7c15_u64;
        let outputs: Vec<u64> =
            (0..3).map(|i| splitmix64(1_234_567_u64.wrapping_add(increment.wrapping_mul(i)))).collect();
        assert_eq!(outputs, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }
}
