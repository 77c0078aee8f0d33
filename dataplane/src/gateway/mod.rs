//! Gateways: how clients reach volumes. Each turns its protocol into `volume::request::BlockRequest`s.

pub mod nbd;
