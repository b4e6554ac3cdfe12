//! The store: segments of flow records on disk.

pub mod fields;
