//! Options that the tools share, the client that they make, and the completion of all options.

use std::time::Duration;

use clap::{Args, CommandFactory};
use xsan_client::{Address, ControlClient, Options};

/// Which cluster to ask, and how to show the answer.
#[derive(Clone, Debug, Args)]
pub struct Connection {
    /// Any node of the cluster, or several with commas; the port is 8080 if not given
    #[arg(
        long,
        short,
        global = true,
        env = "XSAN_ADDRESS",
        value_name = "HOST[:PORT]",
        default_value = "127.0.0.1:8080",
        value_delimiter = ','
    )]
    pub address: Vec<Address>,
    /// Seconds to wait for an answer; while no address even takes a connection, 3 at most
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 15,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,
    /// Show the answer (and errors) as JSON, for programs
    #[arg(long, global = true)]
    pub json: bool,
}

impl Connection {
    pub fn client(&self) -> ControlClient {
        let deadline = Duration::from_secs(self.timeout);
        let defaults = Options::default();
        let options = Options {
            connect_timeout: defaults.connect_timeout.min(deadline),
            attempt_timeout: defaults.attempt_timeout.min(deadline),
            deadline,
            unreachable_deadline: defaults.unreachable_deadline.min(deadline),
        };
        ControlClient::new(self.address.clone(), options)
    }
}

/// The completion script of `tool` for a shell, for whoever prints it: a pipe may end early.
pub fn completion<Tool: CommandFactory>(shell: clap_complete::Shell, tool: &str) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Tool::command(), tool, &mut script);
    String::from_utf8(script).expect("a script of names and help, which are text")
}
