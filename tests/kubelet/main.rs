//! The product on a real node: helm, kubelet, containerd, DNS and Prometheus. Cases share one
//! cluster and run in this order; the first and the last are a user's path from `helm install`
//! to `helm uninstall`.

mod identity;
mod path;
mod prometheus;
mod refusals;
mod world;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use overlay_tests::cases::{self, Case};
use overlay_tests::cluster::Cluster;
use overlay_tests::cluster::footprint::Footprint;
use overlay_tests::wait;
use rustix::process::{Pid, Signal, kill_process};
use world::World;

const CASES: &[Case<World>] = &[
    ("helm_installs_the_operator", path::helm_installs_the_operator),
    ("the_example_becomes_ready", path::the_example_becomes_ready),
    ("columns", path::columns),
    ("messages_reach_every_pod", path::messages_reach_every_pod),
    ("a_mebibyte_arrives_whole", path::a_mebibyte_arrives_whole),
    ("a_gossip_cap_changes_in_running_daemons", path::a_gossip_cap_changes_in_running_daemons),
    ("a_deleted_pod_rejoins_under_traffic", path::a_deleted_pod_rejoins_under_traffic),
    ("another_operator_takes_over", path::another_operator_takes_over),
    ("no_leaf_key_stands_in_a_secret", identity::no_leaf_key_stands_in_a_secret),
    ("self_managed_keeps_its_leaf_in_a_secret", identity::self_managed_keeps_its_leaf_in_a_secret),
    ("a_foreign_pod_gets_no_certificate", identity::a_foreign_pod_gets_no_certificate),
    ("an_image_that_is_not_there_shows", refusals::an_image_that_is_not_there_shows),
    ("a_quota_of_zero_pods_shows", refusals::a_quota_of_zero_pods_shows),
    ("a_namespace_that_refuses_the_pod_shows", refusals::a_namespace_that_refuses_the_pod_shows),
    ("the_mesh_scales_to_five", path::the_mesh_scales_to_five),
    ("prometheus_finds_and_queries_everything", prometheus::finds_and_queries_everything),
    ("deletion_collects_everything", path::deletion_collects_everything),
    ("helm_uninstall_keeps_what_the_values_say", path::helm_uninstall_keeps_what_the_values_say),
];

fn main() -> ExitCode {
    let before = Footprint::take();
    let after = || {
        let before = before?;
        before.wait_for_return()?;
        a_crash_is_cleaned_up_by_the_next_start()?;
        before.wait_for_return()
    };
    cases::run_and_then(World::start, CASES, ("the_machine_is_as_it_was", after))
}

/// The sandbox is killed, and nobody is there to tidy up.
fn a_crash_is_cleaned_up_by_the_next_start() -> Result<()> {
    let crashed = Cluster::up("crash")?;
    let pid = i32::try_from(crashed.process()).ok().and_then(Pid::from_raw).context("no process")?;
    kill_process(pid, Signal::KILL)?;
    wait::until_true("the node to be dead", world::LIMIT, || Ok(Cluster::running("crash").is_err()))?;
    ensure!(crashed.folder().exists(), "a crash leaves the folder");
    let again = Cluster::start("crash")?;
    again.admin().run(&["get", "nodes"])?;
    Ok(())
}
