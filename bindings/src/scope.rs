//! Whose memory a call touches, and who said a turn.
//! Knows no engine.

/// Whose memory a call touches.
#[derive(Debug, Clone, PartialEq, Eq, Hash, uniffi::Record)]
pub struct Scope {
    /// The user.
    pub user: String,
    /// The agent, if one is meant.
    #[uniffi(default)]
    pub agent: Option<String>,
    /// The session, if one is meant.
    #[uniffi(default)]
    pub session: Option<String>,
}

impl From<Scope> for mka::Scope {
    fn from(from: Scope) -> Self {
        let mut scope = Self::user(from.user);
        if let Some(agent) = from.agent {
            scope = scope.agent(agent);
        }
        if let Some(session) = from.session {
            scope = scope.session(session);
        }
        scope
    }
}

impl From<&mka::Scope> for Scope {
    fn from(scope: &mka::Scope) -> Self {
        Self {
            user: scope.user_id().to_owned(),
            agent: scope.agent_id().map(str::to_owned),
            session: scope.session_id().map(str::to_owned),
        }
    }
}

/// Who produced a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, uniffi::Enum)]
pub enum Role {
    /// Instructions of the host.
    System,
    /// A human's message.
    User,
    /// The model's answer.
    Assistant,
    /// A document fed to the session.
    Document,
    /// Text that memory gave back to the model: logged, never recalled again.
    Recalled,
    /// What a tool gave back to the model that called it.
    Tool,
}

impl From<Role> for mka::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::System => Self::System,
            Role::User => Self::User,
            Role::Assistant => Self::Assistant,
            Role::Document => Self::Document,
            Role::Recalled => Self::Recalled,
            Role::Tool => Self::Tool,
        }
    }
}

impl From<mka::Role> for Role {
    fn from(role: mka::Role) -> Self {
        match role {
            mka::Role::System => Self::System,
            mka::Role::User => Self::User,
            mka::Role::Assistant => Self::Assistant,
            mka::Role::Recalled => Self::Recalled,
            mka::Role::Tool => Self::Tool,
            // A role that this surface does not know yet is text from somewhere: trusted least.
            _ => Self::Document,
        }
    }
}
