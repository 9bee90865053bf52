//! Whose memory a call touches: user, agent, session.
//! Knows nothing of what is stored under a scope.

use std::fmt;

use serde::Serialize;

use crate::{Error, Result};

/// The longest part of a scope, in bytes.
const MAX_PART_BYTES: usize = 256;

/// Whose memory a call touches; there is no default, so it cannot be left out.
///
/// A scope without an agent reads across all agents of its user; with one, only that agent's sessions.
/// A session belongs to exactly one (user, agent) pair.
/// Parts are checked when the scope is used: non-empty, at most 256 bytes each.
///
/// ```
/// use mka_memory::Scope;
/// let scope = Scope::user("ada").agent("planner").session("trip");
/// assert_eq!(scope.session_id(), Some("trip"));
/// assert_eq!(scope.to_string(), "ada/planner/trip");
/// ```
// The order of fields is the order of `Ord`: one user's scopes are neighbours in a sorted map.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Scope {
    user: String,
    agent: Option<String>,
    session: Option<String>,
}

impl Scope {
    /// Everything of one user.
    pub fn user(user: impl Into<String>) -> Self {
        Self { user: user.into(), agent: None, session: None }
    }

    /// The same scope, narrowed to one agent.
    pub fn agent(mut self, agent: impl Into<String>) -> Self {
        self.agent = Some(agent.into());
        self
    }

    /// The same scope, narrowed to one session.
    pub fn session(mut self, session: impl Into<String>) -> Self {
        self.session = Some(session.into());
        self
    }

    /// The user.
    pub fn user_id(&self) -> &str {
        &self.user
    }

    /// The agent, if the scope names one.
    pub fn agent_id(&self) -> Option<&str> {
        self.agent.as_deref()
    }

    /// The session, if the scope names one.
    pub fn session_id(&self) -> Option<&str> {
        self.session.as_deref()
    }

    /// Refuses empty and oversized parts.
    pub(crate) fn check(&self, operation: &str) -> Result<()> {
        let parts = [
            ("user", Some(self.user.as_str())),
            ("agent", self.agent.as_deref()),
            ("session", self.session.as_deref()),
        ];
        for (name, part) in parts {
            let Some(part) = part else { continue };
            if part.is_empty() || part.len() > MAX_PART_BYTES {
                return Err(Error::invalid(format!(
                    "{operation}: {name} of the scope must have 1 to {MAX_PART_BYTES} bytes, got {}",
                    part.len()
                )));
            }
        }
        Ok(())
    }

    /// Refuses, besides what [`check`](Self::check) refuses, a scope that names no session.
    pub(crate) fn check_session(&self, operation: &str) -> Result<()> {
        self.check(operation)?;
        if self.session.is_none() {
            return Err(Error::invalid(format!(
                "{operation}: expected a scope with a session, got `{self}`"
            )));
        }
        Ok(())
    }

    /// Whether `session`, a full session scope, lies inside this scope.
    pub(crate) fn contains(&self, session: &Scope) -> bool {
        self.user == session.user
            && (self.agent == session.agent || (self.agent.is_none() && self.session.is_none()))
            && (self.session.is_none() || self.session == session.session)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.user)?;
        if self.agent.is_some() || self.session.is_some() {
            write!(f, "/{}", self.agent.as_deref().unwrap_or("*"))?;
        }
        match &self.session {
            Some(session) => write!(f, "/{session}"),
            None => Ok(()),
        }
    }
}
