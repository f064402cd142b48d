//! Both profiles: what concerns one daemon holds on each (P-3, G-5).

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
/// `macronode::NAME`.
#[macro_export]
macro_rules! on_both_profiles {
    ($($name:ident),+ $(,)?) => {
        mod micronode {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                super::$name(overlay_core::config::Profile::Micronode)
            })+
        }
        mod macronode {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                super::$name(overlay_core::config::Profile::Macronode)
            })+
        }
    };
}
