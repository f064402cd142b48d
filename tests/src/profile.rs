//! Both profiles: what concerns one daemon holds on each (P-3, G-5).

use anyhow::Result;
use overlay_core::config::Profile;

/// What a manifest says of it, in flow form: a Micronode has amnesia, and a Macronode is tested without.
#[must_use]
pub fn manifest(profile: Profile) -> &'static str {
    match profile {
        Profile::Micronode => "profile: Micronode, amnesia: true",
        Profile::Macronode => "profile: Macronode, amnesia: false",
    }
}

/// The label `amnesia` of every metric.
#[must_use]
pub fn amnesia(profile: Profile) -> &'static str {
    match profile {
        Profile::Micronode => "on",
        Profile::Macronode => "off",
    }
}

/// Makes a test of each function for each profile, which it is given: `micronode::NAME` and
/// `macronode::NAME`. `by RUN:` says what runs them: a function of the test.
#[macro_export]
macro_rules! on_both_profiles {
    (by $run:path: $($name:ident),+ $(,)?) => {
        mod micronode {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                $run(|| super::$name(overlay_core::config::Profile::Micronode))
            })+
        }
        mod macronode {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                $run(|| super::$name(overlay_core::config::Profile::Macronode))
            })+
        }
    };
    ($($name:ident),+ $(,)?) => {
        $crate::on_both_profiles!(by $crate::profile::once: $($name),+);
    };
}

/// A test as it is.
///
/// # Errors
/// The test's.
pub fn once(test: fn() -> Result<()>) -> Result<()> {
    test()
}
