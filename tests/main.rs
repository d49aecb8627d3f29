//! What can be checked without a machine: one binary, so that there is one link and shared fixtures.

mod layers;
