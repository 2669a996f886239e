//! `lockgate explain`: a request, or a connection to a Service.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::Args;

use super::{ObjectArgs, ViewArgs};

pub(super) const EXAMPLES: &str = "\
Examples:
  lockgate explain shop.example/cart --manifests ./manifests
  lockgate explain https://shop.example/ -H 'X-Canary: always' --manifests ./manifests
  lockgate explain https://shop.example/ --admin 127.0.0.1:10254
      asks the Lockgate that runs there, so the answer is about what is live.
  lockgate explain 10.96.0.10:53/udp --client 10.1.1.5 --manifests ./manifests --hostname-override n1
      what a Pod gets from a Service on node n1; --admin 127.0.0.1:10249 asks its node agent.

Exit status: 0 a rule serves the request, 1 none does, 2 the question cannot be answered.";

/// `lockgate explain`
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// What is asked for: https://host/path, or host/path for plain HTTP; ADDR:PORT[/tcp|/udp|/sctp]
    /// with --client
    #[arg(value_name = "URL")]
    pub url: String,
    /// A header of the request; may be repeated
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    pub headers: Vec<String>,
    /// The request's method
    #[arg(short = 'X', long = "request", value_name = "METHOD", default_value = "GET")]
    pub method: String,
    /// Answer from this folder (or file) of manifests
    #[arg(long, value_name = "DIR", env = "LOCKGATE_MANIFESTS", required_unless_present = "admin")]
    pub manifests: Option<PathBuf>,
    /// Who asks: explains what the service plane does with a connection from this address
    #[arg(long, value_name = "ADDR")]
    pub client: Option<IpAddr>,
    /// Answer from the Lockgate whose --admin-addr, or --metrics-bind-address, this is
    #[arg(long, value_name = "ADDR:PORT", conflicts_with = "manifests")]
    pub admin: Option<SocketAddr>,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub objects: ObjectArgs,
    #[allow(missing_docs)]
    #[command(flatten, next_help_heading = "With --client")]
    pub view: ViewArgs,
}
