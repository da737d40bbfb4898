import { unusable } from "./errors.js";
import type { DeliverySummary, NodeFailure } from "./gen/message_pb.js";
import type { Kind } from "./message.js";

/**
 * What became of a push, in one word: the worst that happened to any of its users.
 *
 * - unknown: some may or may not have it.
 * - failed: some do not have it, although they may be online.
 * - offline: nobody has it, because nobody was there, and not all are stored; or the room is not known.
 * - stored: nobody has it yet, and it is stored for all.
 * - delivered: whoever was there has it. That may be nobody, in a room that is empty.
 */
export type Outcome = "unknown" | "failed" | "offline" | "stored" | "delivered";

/** A node and a reason. */
export interface Failure {
  /** The id of a Connect-Node; "" where it is not about a node. */
  node: string;
  outcome: "failed" | "unknown";
  /** For people and logs. */
  reason: string;
  /** How many users it concerns; 0 for a node that did not answer a broadcast. */
  users: number;
}

/** The account of a push that was answered: targets = delivered + offline + failed + unknown. */
export interface Result {
  outcome: Outcome;
  /** Nothing failed, nothing is unknown and the target existed. */
  success: boolean;
  /** The same for people and logs. */
  message: string;
  /** Users whom the push was for; 1 for a user. A broadcast counts what each node reports. */
  targets: number;
  delivered: number;
  offline: number;
  failed: number;
  unknown: number;
  /** Of offline: get it when they come. */
  stored: number;
  /** Of stored: may have it already. */
  unsure: number;
  /** Of delivered: have acknowledged it themselves. */
  acked: number;
  /** Of delivered: had it from an earlier push with the same message id. */
  duplicates: number;
  /** Of offline: connected, and no connection matches the filter. */
  filtered: number;
  /** That of the push, or the one that Push-Manager has made for it; "" for none. */
  messageId: string;
  /** Where a message to a room stands in the room's log; "" if it was not written there. */
  position: string;
  failures: Failure[];
}

/** Reads a reply. What cannot be an account is an error: the push may have been delivered. */
export function resultOf(kind: Kind, reply: { success: boolean; message: string; summary?: DeliverySummary | undefined }): Result {
  const s = reply.summary;
  if (s === undefined) throw unusable("the reply has no summary");
  if (Math.min(s.targets, s.delivered, s.offline, s.failed, s.unknown, s.stored, s.unsure, s.acked, s.duplicates, s.filtered) < 0) {
    throw unusable("the reply has a count below zero");
  }
  const sum = s.delivered + s.offline + s.failed + s.unknown;
  if (sum !== s.targets) throw unusable(`the counts of the reply do not add up: ${s.targets} targets, ${sum} outcomes`);
  const failures = failuresOf(s.nodeFailures);
  const r: Result = {
    outcome: "failed", success: reply.success, message: reply.message,
    targets: s.targets, delivered: s.delivered, offline: s.offline, failed: s.failed, unknown: s.unknown,
    stored: s.stored, unsure: s.unsure, acked: s.acked, duplicates: s.duplicates, filtered: s.filtered, messageId: s.messageId, position: s.position, failures,
  };
  r.outcome = outcomeOf(kind, r);
  return r;
}

function outcomeOf(kind: Kind, r: Result): Outcome {
  if (r.unknown > 0 || r.failures.some((f) => f.outcome === "unknown")) return "unknown";
  if (r.failed > 0 || r.failures.some((f) => f.outcome === "failed")) return "failed";
  if (r.delivered === 0 && r.offline > r.stored) return "offline";
  if (r.delivered === 0 && r.success && (r.stored > 0 || r.position !== "")) return "stored";
  if (r.success) return "delivered";
  return r.targets === 0 && (kind === "room" || kind === "rooms") ? "offline" : "failed"; // The room is not known, or no Connect-Node is.
}

/** What a reply says of nodes. */
export const failuresOf = (all: readonly NodeFailure[]): Failure[] => all.map((f) => ({
  node: f.nodeId, outcome: f.reason.startsWith("unknown") ? "unknown" : "failed", reason: f.reason, users: Math.max(f.users, 0),
}));
