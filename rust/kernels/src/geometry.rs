//! How an image becomes what the backbone sees: resized, and of that a crop.

use crate::error::Error;

/// The sizes of an image on its way; (rows, columns) each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the image.
    pub image: [usize; 2],
    /// Its size after the resize.
    pub resized: [usize; 2],
    /// Where in that the crop begins.
    pub offset: [usize; 2],
    /// Size of the crop.
    pub crop: [usize; 2],
}

impl Geometry {
    /// # Errors
    /// [`Error::Invalid`] when a size is 0 or the crop does not lie within the resized image.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let Self { image, resized, offset, crop } = *self;
        for (name, size) in [("image", image), ("resized", resized), ("crop", crop)] {
            if size.contains(&0) {
                return Err(Error::invalid(name, "at least one row and one column", format!("{size:?}")));
            }
        }
        for axis in 0..2 {
            if offset[axis].checked_add(crop[axis]).is_none_or(|end| end > resized[axis]) {
                let expected = format!("a part of the resized image, {resized:?}");
                return Err(Error::invalid("crop", expected, format!("{crop:?} from {offset:?}")));
            }
        }
        Ok(())
    }
}
