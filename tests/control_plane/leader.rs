//! Two operators at once: which of them acts, and who takes over when it is gone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use overlay_tests::operator::{LEADER, NAMESPACE as OPERATOR_NAMESPACE, Operator, STANDBY};
use overlay_tests::wait;

use crate::world::{LIMIT, QUIET, World};

const LEASE: &str = "overlay-operator";
/// From the end of a leader that gave its lease back to another that leads.
const HANDED_OVER: Duration = Duration::from_secs(3);
/// The lease's duration, less what the standby may have seen late and the leader renewed early.
const RUNS_OUT_AFTER: Duration = Duration::from_secs(12);
const RUN_OUT_BEFORE: Duration = Duration::from_secs(20);

pub(crate) fn is_one_and_another_takes_over(world: &World) -> Result<()> {
    let namespace = "leader";
    let one = world.operator.borrow();
    let mut two = one.another("overlay-operator-two")?;
    two.start_as(STANDBY)?;
    ensure!(one.is(LEADER) && one.metric("overlay_operator_leader")? == 1.0);
    ensure!(two.metric("overlay_operator_leader")? == 0.0);
    drop(one);
    world.apply_node(namespace, "first", "{replicas: 1}")?;
    world.settled(namespace, "first")?;
    wait::throughout("the standby does nothing", QUIET, || {
        let idle =
            two.metric("overlay_operator_reconciles_total")? + two.metric("overlay_operator_writes_total")? == 0.0;
        Ok(idle && two.is(STANDBY))
    })?;

    let ended = world.operator.borrow_mut().stop()?;
    ensure!(ended.success(), "the leader ended with {ended} on SIGTERM");
    let took = until_leads(&two)?;
    ensure!(took < HANDED_OVER, "the other took over {took:?} after a SIGTERM");
    ensure!(holder(world)?.starts_with("overlay-operator-two_"), "{}", holder(world)?);
    world.apply_node(namespace, "second", "{replicas: 1}")?;
    world.settled(namespace, "second")?;

    world.operator.borrow_mut().start_as(STANDBY)?;
    two.kill()?;
    let one = world.operator.borrow();
    let took = until_leads(&one)?;
    ensure!((RUNS_OUT_AFTER..RUN_OUT_BEFORE).contains(&took), "the other took over {took:?} after a SIGKILL");
    world.apply_node(namespace, "third", "{replicas: 1}")?;
    world.settled(namespace, "third")?;
    assert_eq!(one.metric("overlay_operator_writes_refused_total")?, 0.0);
    Ok(())
}

/// The lease is somebody else's: the leader leaves at once and says why, so that two never act.
pub(crate) fn without_its_lease_ends(world: &World) -> Result<()> {
    let thief = r#"{"spec":{"holderIdentity":"thief"}}"#;
    world.admin().run(&["patch", "lease", "-n", OPERATOR_NAMESPACE, LEASE, "--type=merge", "-p", thief])?;
    let log = world.plane.folder().join("overlay-operator.log");
    let ended = world.operator.borrow_mut().ends()?;
    ensure!(ended.code() == Some(1), "it ended with {ended}");
    let log = std::fs::read_to_string(log)?;
    ensure!(log.contains("lost the lease, stops at once: thief took it"), "the log does not say why");
    assert_eq!(holder(world)?, "thief", "what is another's is not released");
    let nobody = r#"{"spec":{"holderIdentity":null}}"#;
    world.admin().run(&["patch", "lease", "-n", OPERATOR_NAMESPACE, LEASE, "--type=merge", "-p", nobody])?;
    world.operator.borrow_mut().start()
}

/// No answer to a renewal: the leader leaves before its lease can be another's.
pub(crate) fn that_is_cut_off_ends(world: &World) -> Result<()> {
    let log = world.plane.folder().join("overlay-operator.log");
    let from = wait::now();
    world.plane.freeze_api_server();
    let ended = world.operator.borrow_mut().ends();
    let took = from.elapsed();
    world.plane.thaw_api_server();
    let ended = ended?;
    ensure!(ended.code() == Some(1) && took < RUNS_OUT_AFTER, "it ended with {ended} after {took:?}");
    ensure!(std::fs::read_to_string(log)?.contains("lost the lease, stops at once: it could not be renewed in time"));
    world.operator.borrow_mut().start()
}

fn until_leads(operator: &Operator) -> Result<Duration> {
    let from = wait::now();
    wait::until_true("the other operator to lead", LIMIT, || Ok(operator.is(LEADER)))?;
    Ok(from.elapsed())
}

fn holder(world: &World) -> Result<String> {
    let lease = world.admin().must_get(OPERATOR_NAMESPACE, "lease", LEASE)?;
    Ok(lease["spec"]["holderIdentity"].as_str().context("nobody holds the lease")?.to_owned())
}
