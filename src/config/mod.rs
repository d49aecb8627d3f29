//! Text becomes checked values here; errors carry file, line, column and what to do.
//!
//! Called by the manager (loading), by the worker (a definition sent back as JSON, and templates) and by
//! `nervectl validate`. Imports only [`crate::model`]. No function here panics, whatever it is fed, and nothing but
//! [`directory`], [`settings::load`] and [`definition::host_warnings`] touches the machine.

pub mod convert;
pub mod definition;
pub mod diagnostic;
pub mod directory;
mod emit;
mod host;
mod liquid;
pub mod meta;
pub mod moment;
pub mod picture;
mod reader;
mod retention;
mod roles;
mod routes;
pub mod settings;
pub mod template;
mod template_shape;
pub mod time;
mod tools;
pub mod unit_settings;
mod unit_syntax;
mod work;
mod yaml;
