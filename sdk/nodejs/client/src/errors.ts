import { fromBinary } from "@bufbuild/protobuf";
import { anyUnpack } from "@bufbuild/protobuf/wkt";
import { status, type ServiceError } from "@grpc/grpc-js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { StatusSchema, type Status } from "./gen/google/rpc/status_pb.js";

/** That of Push-Manager's ErrorInfo. With it, nothing was sent. */
const domain = "push-manager";

/** Why a push has no Result. */
export class PushError extends Error {
  /** The gRPC status. */
  readonly code: status;
  /** Push-Manager's word for it, such as OVERLOADED or PERMISSION_DENIED; "" if the error is not Push-Manager's. */
  readonly reason: string;
  /** The field of the request that is at fault, such as content.data; "" for none. */
  readonly field: string;
  /** When Push-Manager wants to be asked again, in milliseconds; undefined: it does not say. */
  readonly retryAfter: number | undefined;
  /** Nothing was sent, by none of the tries: to push again is safe, also without a message id. False: it may have been delivered. */
  readonly notSent: boolean;
  /** How often the push was tried. */
  readonly tries: number;

  constructor(readonly text: string, o: { code: status; reason?: string; field?: string; retryAfter?: number | undefined; notSent?: boolean; tries?: number }) {
    const notSent = o.notSent ?? false;
    const tries = o.tries ?? 1;
    const words = [status[o.code] ?? String(o.code)];
    if (o.reason) words.push(o.reason);
    if (tries > 1) words.push(`${tries} tries`);
    super(`push: ${text} (${words.join(", ")}; ${notSent ? "nothing was sent" : "it may have been delivered"})`);
    this.name = "PushError";
    this.code = o.code;
    this.reason = o.reason ?? "";
    this.field = o.field ?? "";
    this.retryAfter = o.retryAfter;
    this.notSent = notSent;
    this.tries = tries;
  }

  /** The opposite of notSent. */
  get isUnknown(): boolean {
    return !this.notSent;
  }

  /** The same after some tries, one of which may have been delivered. */
  about(tries: number, maybe: boolean): PushError {
    return new PushError(this.text, {
      code: this.code, reason: this.reason, field: this.field, retryAfter: this.retryAfter, notSent: this.notSent && !maybe, tries,
    });
  }
}

/** The error of a call. sent: it was given to a connection. */
export function errorOf(error: ServiceError, sent: boolean): PushError {
  const packed = error.metadata?.get("grpc-status-details-bin")[0];
  let s: Status | undefined;
  if (packed instanceof Uint8Array) {
    try {
      s = fromBinary(StatusSchema, packed);
    } catch {
      // As without details.
    }
  }
  // Without a connection nothing has left. A server that does not know the method has done nothing.
  return errorOfStatus(error.code, error.details || error.message, s, !sent || error.code === status.UNIMPLEMENTED);
}

/** The error of a status that a server has sent. */
export function errorOfStatus(code: status, text: string, s: Status | undefined, notSent = false): PushError {
  const o = { code, reason: "", field: "", retryAfter: undefined as number | undefined, notSent };
  for (const detail of s?.details ?? []) {
    try {
      const info = anyUnpack(detail, ErrorInfoSchema);
      if (info !== undefined && info.domain === domain) {
        o.notSent = true;
        o.reason = info.reason;
        o.field ||= info.metadata["field"] ?? "";
      }
      const after = anyUnpack(detail, RetryInfoSchema);
      if (after !== undefined) {
        const delay = after.retryDelay;
        o.retryAfter = Math.max(Number(delay?.seconds ?? 0n) * 1000 + (delay?.nanos ?? 0) / 1e6, 0);
      }
      const bad = anyUnpack(detail, BadRequestSchema);
      if (bad !== undefined && bad.fieldViolations[0] !== undefined) o.field = bad.fieldViolations[0].field;
    } catch {
      // A detail that cannot be read says nothing.
    }
  }
  return new PushError(text, o);
}

/** The error for an answer that says nothing. */
export const unusable = (text: string): PushError => new PushError(text, { code: status.INTERNAL });

/** The error for what is refused here. */
export const invalid = (field: string, text: string): PushError =>
  new PushError(`${field}: ${text}`, { code: status.INVALID_ARGUMENT, field, notSent: true });

/** Whether another try can end better: not after what a caller has done, or has no right to. */
export const isUnclear = (code: status): boolean =>
  [status.UNAVAILABLE, status.INTERNAL, status.UNKNOWN, status.ABORTED, status.RESOURCE_EXHAUSTED, status.DEADLINE_EXCEEDED].includes(code);

/** Whether it is the message of a PushStream that is at fault, and not the call. */
export const isOfMessage = (e: PushError): boolean =>
  e.code === status.INVALID_ARGUMENT || e.reason === "REQUEST_TOO_LARGE" || e.reason === "REQUEST_TOO_SLOW";
