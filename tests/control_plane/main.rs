//! The operator against a real etcd, API server and controller manager, under its chart's RBAC.
//! Cases share them, each in a namespace of its own.

mod chart;
mod faults;
mod leader;
mod manifests;
mod mesh;
mod shortage;
mod pod_certificates;
mod world;

use std::process::ExitCode;

use overlay_tests::cases::{self, Case};

use world::World;

const CASES: &[Case<World>] = &[
    ("crd_is_established_and_named", mesh::crd_is_established_and_named),
    ("chart_lints", chart::lints),
    ("chart_is_accepted_by_the_api_server", chart::is_accepted),
    ("chart_values_are_checked", chart::values_are_checked),
    ("chart_crd_is_the_committed_one_and_is_kept", chart::crd_is_the_committed_one_and_is_kept),
    ("chart_images_by_tag_and_digest", chart::images_by_tag_and_digest),
    ("rbac_grants_the_least", chart::rbac_grants_the_least),
    ("manifests_same_verdict_in_local_and_api_server", manifests::same_verdict),
    ("rules_are_enforced_by_the_api_server", manifests::rules_are_enforced),
    ("mesh_objects_and_owners", mesh::objects_and_owners),
    ("mesh_conditions", mesh::conditions),
    ("mesh_columns", mesh::columns),
    ("mesh_configuration_passes_the_daemons_check", mesh::configuration_passes_check),
    ("mesh_token_is_minted_from_the_clusters_secret", mesh::token_is_minted_from_the_clusters_secret),
    ("mesh_pods_fit_restricted_pod_security", mesh::pods_fit_restricted),
    ("second_reconcile_writes_nothing", mesh::second_reconcile_writes_nothing),
    ("operator_restart_changes_nothing", faults::restart_changes_nothing),
    ("mesh_scales", mesh::scales),
    ("mesh_live_changes_roll_nothing", mesh::live_changes_roll_nothing),
    ("mesh_children_are_collected", mesh::children_are_collected),
    ("foreign_child_stalls", faults::foreign_child_stalls),
    ("changed_child_is_put_back", faults::changed_child_is_put_back),
    ("pod_certificates_no_secret_holds_a_key", pod_certificates::no_secret_holds_a_key),
    ("pod_certificates_only_for_the_meshs_pods", pod_certificates::only_the_meshs_pods_are_certified),
    ("pod_certificates_auto_follows_the_cluster", pod_certificates::auto_follows_the_cluster),
    ("missing_ca_is_never_replaced", faults::missing_ca_is_never_replaced),
    ("every_taken_name_is_told", faults::every_taken_name_is_told),
    ("a_stall_keeps_no_mesh_from_its_tokens", faults::a_stall_keeps_no_mesh_from_its_tokens),
    ("shortage_quota_is_told_while_it_lasts", shortage::quota_is_told_while_it_lasts),
    ("shortage_refused_pods_are_told", shortage::refused_pods_are_told),
    ("leader_is_one_and_another_takes_over", leader::is_one_and_another_takes_over),
    ("leader_without_its_lease_ends", leader::without_its_lease_ends),
    ("leader_that_is_cut_off_ends", leader::that_is_cut_off_ends),
    ("chart_is_installed_again_over_the_kept_crd", chart::is_installed_again),
    ("chart_monitors_and_replicas", chart::monitors_and_replicas),
];

fn main() -> ExitCode {
    cases::run(World::start, CASES)
}
