//! Slow twins: plain loops that are obviously right. Every test of a kernel compares with these by `==`.

/// D2 of [`crate::distance`], lane by lane.
pub fn squared_distance(x: &[f32], y: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; 16];
    for (i, (&a, &b)) in x.iter().zip(y).enumerate() {
        let difference = f64::from(a) - f64::from(b);
        lanes[i % 16] += difference * difference;
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}
