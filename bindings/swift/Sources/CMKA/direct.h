// Plain functions of the library for what a caller asks for at every token; bindings/src/direct.rs holds the other side.
// Written by hand; a change of one is a change of both.

#pragma once

#include <stddef.h>
#include <stdint.h>

/// What a call gives back; `data` goes to `mka_direct_free` once it is read.
typedef struct MKAReply {
    /// Bytes of the answer, or of an error: its kind, a zero byte, its text. NULL if there are none.
    uint8_t *_Nullable data;
    /// Their number.
    size_t len;
    /// 0: an answer; without bytes there is none yet. 1: the end, nothing follows. 2: an error.
    uint32_t code;
} MKAReply;

/// Somebody who waits.
typedef struct MKACaller {
    /// One reference of it goes over to the library.
    void *_Nonnull context;
    /// Called from any thread, any number of times, also from within a call.
    void (*_Nonnull wake)(void *_Nonnull context);
    /// Called once, from any thread, behind the last `wake`.
    void (*_Nonnull release)(void *_Nonnull context);
} MKACaller;

/// The events of a stream that are ready; if there are none yet, or behind what there was, it tells `caller` when it is to
/// be asked again. Returns at once.
void mka_direct_poll_for(uint64_t stream, MKACaller caller, MKAReply *_Nonnull reply);

/// Gives the bytes of a reply back.
void mka_direct_free(uint8_t *_Nullable data, size_t len);
