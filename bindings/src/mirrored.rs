//! What the records of options share: an enum that mirrors one of the engine, a field that may be left out, a count.
//! Knows no option.

/// An enum with the variants of an engine's, which it becomes.
macro_rules! mirrored {
    ($(#[$doc:meta])* pub enum $name:ident for $engine:path {
        $($(#[$variant_doc:meta])* $variant:ident,)*
    }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, uniffi::Enum)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl From<$name> for $engine {
            fn from(from: $name) -> Self {
                match from {
                    $($name::$variant => Self::$variant,)*
                }
            }
        }
    };
}
pub(crate) use mirrored;

/// Sets `field` if there is a value.
pub(crate) fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

/// A count from outside; one beyond this machine's reach is the largest there is.
pub(crate) fn count(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
