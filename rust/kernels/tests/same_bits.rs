//! Answers that exp, ln or cos takes part in are the same bits on every machine, as hashes that were noted once.

use patchcore_kernels::anomaly_map::{Border, Options, Upsampling, anomaly_maps};
use patchcore_kernels::context::Context;
use patchcore_kernels::coreset::{Projection, project};
use patchcore_kernels::matrix::Matrix;
use patchcore_kernels::nearest::{Distance, MemoryBank, Storage};
use patchcore_kernels::random::splitmix64;
use patchcore_kernels::score::image_scores;
use patchcore_kernels::simd::Level;

/// FNV-1a of the bits of some numbers.
fn hash(bits: impl IntoIterator<Item = u64>) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    bits.into_iter().flat_map(u64::to_le_bytes).fold(0xcbf2_9ce4_8422_2325, step)
}

/// Numbers in [0, 8) of 24 random bits each.
fn values(len: u64, seed: u64) -> Vec<f32> {
    (0..len).map(|i| (splitmix64(splitmix64(seed) ^ i) >> 40) as f32 / 2_097_152.0).collect()
}

#[test]
fn image_scores_are_the_same_bits_everywhere() {
    let (bank, patches) = (values(64 * 3, 1), values(10_000 * 3, 2));
    let rows = Matrix::new("features", &bank, 64, 3).unwrap();
    let features = Matrix::new("features", &patches, 10_000, 3).unwrap();
    for level in Level::available() {
        let context = Context::new(level, 2);
        let bank = MemoryBank::new(&context, rows, Storage::Float32).unwrap();
        let found = bank.kneighbors(&context, features, 1, Distance::Euclidean).unwrap();
        let nearest = (&*found.distances, &*found.indices);
        let scores = image_scores(&context, &bank, features, nearest, 1, 9).unwrap();
        assert_eq!(hash(scores.iter().map(|score| score.to_bits())), 5_694_719_746_100_755_202, "{level}");
    }
}

#[test]
fn the_weights_of_maps_are_the_same_bits_everywhere() {
    // One patch of score 1 among others of score 0: its map is made of weights.
    let mut scores = [0.0; 7 * 9];
    scores[3 * 9 + 4] = 1.0;
    for level in Level::available() {
        let mut bits = Vec::new();
        for sigma in [0.7, 4.0, 13.3] {
            let (upsampling, border) = (Upsampling::Bilinear, Border::Reflect);
            let options = Options { height: 56, width: 72, sigma, upsampling, border };
            let mut map = [0.0; 56 * 72];
            anomaly_maps(&Context::new(level, 2), &scores, [1, 7, 9], options, &mut map).unwrap();
            bits.extend(map.map(|pixel| u64::from(pixel.to_bits())));
        }
        assert_eq!(hash(bits), 12_173_965_760_497_694_141, "{level}");
    }
}

#[test]
fn projections_are_the_same_bits_everywhere() {
    // The rows of the identity: their projection is the random matrix.
    let mut identity = vec![0.0; 100 * 100];
    (0..100).for_each(|i| identity[i * 101] = 1.0);
    let features = Matrix::new("features", &identity, 100, 100).unwrap();
    for (kind, expected) in
        [(Projection::Gaussian, 5_560_602_904_688_849_926), (Projection::Sparse, 4_820_244_254_234_844_726)]
    {
        for level in Level::available() {
            let entries = project(&Context::new(level, 2), features, 200, kind, 7).unwrap();
            assert_eq!(hash(entries.iter().map(|entry| u64::from(entry.to_bits()))), expected, "{kind:?} {level}");
        }
    }
}
