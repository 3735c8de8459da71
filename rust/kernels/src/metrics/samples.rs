//! Labels and scores of images or of pixels, checked once for every metric.

use std::ops::Range;

use super::radix::per_block;
use super::rank::{Classes, Score, Step, ranked, steps};
use crate::context::Context;
use crate::error::Error;

/// Scores with a label each: 0 is normal, 1 is anomalous; 2, of pixels only, is left out of every metric.
#[derive(Clone, Copy, Debug)]
pub struct Samples<'a, S> {
    pub(super) labels: &'a [u8],
    pub(super) scores: &'a [S],
    /// Height and width of each image; None where the samples are images.
    sizes: Option<&'a [[usize; 2]]>,
    pub(super) anomalies: usize,
    pub(super) normals: usize,
    names: Names,
}

/// How messages call the arguments, and what has one label and one score.
#[derive(Clone, Copy, Debug)]
struct Names {
    labels: &'static str,
    scores: &'static str,
    each: &'static str,
}

const IMAGES: Names = Names { labels: "labels", scores: "scores", each: "images" };
const PIXELS: Names = Names { labels: "masks", scores: "maps", each: "pixels" };

impl<'a, S: Score> Samples<'a, S> {
    /// One label and one score for each image.
    ///
    /// # Errors
    /// [`Error::Empty`] without images; [`Error::Invalid`] when the lengths differ, a label is neither 0 nor
    /// 1, or a score is not finite.
    pub fn images(labels: &'a [u8], scores: &'a [S], context: &Context) -> Result<Self, Error> {
        let known = |&label: &u8| label <= 1;
        Self::new(IMAGES, labels, scores, None, context)?.labelled(known, "0 (normal) or 1 (anomalous)", context)
    }

    /// The pixels of all images, one image after the other, row after row: their masks, in which 2 is a pixel that is
    /// left out, their anomaly maps, and (height, width) of each image.
    ///
    /// # Errors
    /// [`Error::Empty`] without images; [`Error::Invalid`] when an image has no pixels, the lengths are not those of
    /// the sizes, a label is above 2, or a score is not finite.
    pub fn pixels(masks: &'a [u8], maps: &'a [S], sizes: &'a [[usize; 2]], context: &Context) -> Result<Self, Error> {
        check_sizes(masks, sizes)?;
        let known = |&label: &u8| label <= 2;
        let expected = "0 (normal), 1 (anomalous) or 2 (left out)";
        Self::new(PIXELS, masks, maps, Some(sizes), context)?.labelled(known, expected, context)
    }

    fn new(
        names: Names,
        labels: &'a [u8],
        scores: &'a [S],
        sizes: Option<&'a [[usize; 2]]>,
        context: &Context,
    ) -> Result<Self, Error> {
        if labels.len() != scores.len() {
            let expected = format!("of the same length as {}, {}", names.labels, labels.len());
            return Err(Error::invalid(names.scores, expected, scores.len()));
        }
        if labels.is_empty() {
            return Err(Error::Empty { name: names.scores, expected: "a metric needs at least one score" });
        }
        let samples = Self { labels, scores, sizes, anomalies: 0, normals: 0, names };
        let bad_score = |&score: &S| !score.into().is_finite();
        if let Some(index) = first(scores, bad_score, context)? {
            let value = scores[index].into().to_string().to_lowercase();
            return Err(samples.bad(names.scores, "finite everywhere", &value, index));
        }
        Ok(samples)
    }

    /// Refuses labels that are not `known` and counts the others.
    fn labelled(
        mut self,
        known: impl Fn(&u8) -> bool + Sync,
        expected: &str,
        context: &Context,
    ) -> Result<Self, Error> {
        let labels = self.labels;
        if let Some(index) = first(labels, |label| !known(label), context)? {
            return Err(self.bad(self.names.labels, expected, &labels[index].to_string(), index));
        }
        let count = |range: Range<usize>| [0, 1].map(|wanted| count(&labels[range.clone()], wanted));
        for [normals, anomalies] in per_block(labels.len(), context, count)? {
            self.normals += normals;
            self.anomalies += anomalies;
        }
        Ok(self)
    }

    fn bad(&self, name: &'static str, expected: &str, value: &str, index: usize) -> Error {
        let mut at = index;
        for (image, &[height, width]) in self.sizes.unwrap_or_default().iter().enumerate() {
            if at < height * width {
                let place = format!("{value} at index {image}, row {}, column {}", at / width, at % width);
                return Error::invalid(name, expected, place);
            }
            at -= height * width;
        }
        Error::invalid(name, expected, format!("{value} at index {index}"))
    }

    /// Refuses samples among which nothing is anomalous or, for a metric `of_both` classes, nothing normal.
    pub(super) fn require(&self, of_both: bool, metric: &str) -> Result<(), Error> {
        if self.anomalies > 0 && (self.normals > 0 || !of_both) {
            return Ok(());
        }
        let each = self.names.each;
        let expected = if of_both {
            format!("of both classes, for {metric} compares anomalous {each} with normal ones")
        } else {
            format!("1 (anomalous) at least once, for {metric} is about finding anomalous {each}")
        };
        let counted = self.anomalies + self.normals;
        let ignored = match self.labels.len() - counted {
            0 => String::new(),
            pixels => format!(" and {pixels} ignored"),
        };
        let got = format!("{} anomalous of {counted} {each}{ignored}", self.anomalies);
        Err(Error::invalid(self.names.labels, expected, got))
    }

    /// (height, width) of each image, for a metric that only pixels have.
    pub(super) fn require_sizes(&self, metric: &str) -> Result<&'a [[usize; 2]], Error> {
        let expected = || format!("pixels, for {metric} is about parts of images");
        self.sizes.ok_or_else(|| Error::invalid(self.names.labels, expected(), format!("{} images", self.labels.len())))
    }

    /// The thresholds of the samples.
    pub(super) fn steps(&self, context: &Context) -> Result<impl Iterator<Item = Step>, Error> {
        let Classes { anomalous, normal } = ranked(self.labels, self.scores, context)?;
        Ok(steps(anomalous, normal, Into::into))
    }
}

/// Refuses an image without pixels, and masks that are not as many values as `sizes` say.
pub(super) fn check_sizes(masks: &[u8], sizes: &[[usize; 2]]) -> Result<(), Error> {
    if let Some(image) = sizes.iter().position(|size| size.contains(&0)) {
        let [height, width] = sizes[image];
        let got = format!("height {height} and width {width} at index {image}");
        return Err(Error::invalid("masks", "of at least one pixel in every image", got));
    }
    let pixels = |&[height, width]: &[usize; 2]| height.checked_mul(width);
    let total = sizes.iter().try_fold(0_usize, |total, size| total.checked_add(pixels(size)?));
    match total {
        Some(total) if total == masks.len() => Ok(()),
        Some(total) => {
            Err(Error::invalid("masks", format!("{total} values, as many as the images have pixels"), masks.len()))
        }
        None => Err(Error::TooLarge { sizes: sizes.concat() }),
    }
}

/// The labels of each image.
pub(super) fn split<'a>(
    mut masks: &'a [u8],
    sizes: &'a [[usize; 2]],
) -> impl ExactSizeIterator<Item = &'a [u8]> + Send {
    sizes.iter().map(move |[height, width]| {
        let (image, rest) = masks.split_at(height * width);
        masks = rest;
        image
    })
}

/// How many labels are the one that is wanted.
pub(super) fn count(labels: &[u8], wanted: u8) -> usize {
    // A byte counts up to 255, and a vector has the most lanes of bytes.
    let of = |chunk: &[u8]| usize::from(chunk.iter().map(|&label| u8::from(label == wanted)).sum::<u8>());
    labels.chunks(255).map(of).sum()
}

/// The index of the first value that is `bad`.
fn first<T: Sync>(values: &[T], bad: impl Fn(&T) -> bool + Sync, context: &Context) -> Result<Option<usize>, Error> {
    // Whether there is any is asked of a whole block first: that loop has no branches.
    let look = |range: Range<usize>| {
        let block = &values[range.clone()];
        let any = block.iter().fold(false, |any, value| any | bad(value));
        if any { block.iter().position(&bad).map(|at| range.start + at) } else { None }
    };
    Ok(per_block(values.len(), context, look)?.into_iter().flatten().next())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{aupimo, average_precision, pro, roc_auc};
    use crate::simd::Level;

    fn context() -> Context<'static> {
        Context::new(Level::Scalar, 2)
    }

    fn message(labels: &[u8], scores: &[f64]) -> String {
        Samples::images(labels, scores, &context()).unwrap_err().to_string()
    }

    #[test]
    fn arguments_are_checked() {
        assert_eq!(message(&[0, 1], &[0.5]), "scores must be of the same length as labels, 2; got 1");
        assert_eq!(message(&[], &[]), "scores is empty: a metric needs at least one score");
        assert_eq!(message(&[0, 1, 2], &[0.5; 3]), "labels must be 0 (normal) or 1 (anomalous); got 2 at index 2");
        for (bad, text) in [(f64::NAN, "nan"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")] {
            let expected = format!("scores must be finite everywhere; got {text} at index 1");
            assert_eq!(message(&[0, 1, 2], &[0.5, bad, bad]), expected);
        }
    }

    #[test]
    fn pixels_are_checked_and_named_by_image_row_and_column() {
        let refused = |masks: &[u8], maps: &[f32], sizes: &[[usize; 2]]| {
            Samples::pixels(masks, maps, sizes, &context()).unwrap_err().to_string()
        };
        let mut maps = [0.5_f32; 2 * 3 + 3 * 4];
        maps[6 + 2 * 4 + 1] = f32::NAN;
        let sizes = [[2, 3], [3, 4]];
        assert_eq!(
            refused(&[0; 18], &maps, &sizes),
            "maps must be finite everywhere; got nan at index 1, row 2, column 1"
        );
        let mut masks = [2; 18];
        masks[5] = 3;
        assert_eq!(
            refused(&masks, &[0.5; 18], &sizes),
            "masks must be 0 (normal), 1 (anomalous) or 2 (left out); got 3 at index 0, row 1, column 2"
        );
        let expected = "masks must be 6 values, as many as the images have pixels; got 18";
        assert_eq!(refused(&[0; 18], &maps, &sizes[..1]), expected);
        assert!(refused(&[0; 18], &maps, &[[usize::MAX, 2]]).ends_with("does not fit the address space"));
        assert_eq!(
            refused(&[0; 18], &maps, &[[3, 6], [0, 6]]),
            "masks must be of at least one pixel in every image; got height 0 and width 6 at index 1"
        );
        assert!(refused(&[], &[], &[]).starts_with("maps is empty"));
    }

    #[test]
    fn images_have_no_parts() {
        let samples = Samples::images(&[0, 1], &[0.5_f32, 0.6], &context()).unwrap();
        let refusal = pro(&samples, 0.3, &context()).unwrap_err().to_string();
        assert_eq!(refusal, "labels must be pixels, for PRO is about parts of images; got 2 images");
        assert!(aupimo(&samples, [0.1, 0.2], &context()).unwrap_err().to_string().contains("for AUPIMO"));
    }

    #[test]
    fn pixels_left_out_count_nowhere() {
        let auroc = |masks: &[u8], maps: &[f64]| {
            let samples = Samples::pixels(masks, maps, &[[2, 2], [1, 2]], &context())?;
            roc_auc(&samples, &context())
        };
        assert_eq!(auroc(&[0, 1, 2, 0, 2, 1], &[0.1, 0.4, 0.9, 0.4, 0.0, 0.3]), Ok(0.625));
        let refusal = auroc(&[2, 1, 2, 2, 1, 1], &[0.5; 6]).unwrap_err().to_string();
        assert!(refusal.ends_with("got 3 anomalous of 3 pixels and 3 ignored"), "{refusal}");
        let samples = Samples::pixels(&[2; 6], &[0.5_f32; 6], &[[2, 2], [1, 2]], &context()).unwrap();
        let refusal = average_precision(&samples, &context()).unwrap_err().to_string();
        assert!(refusal.ends_with("got 0 anomalous of 0 pixels and 6 ignored"), "{refusal}");
    }
}
