export { ConnectNode, checkId, type Config, type ConnectOptions, type Stats } from "./node.js";
export type { EtcdConfig } from "./etcd.js";
export type { Attributes } from "./filter.js";
export type { Message, Push } from "./message.js";
export { RefusedError, type Words } from "./refusals.js";
export type { TlsFiles } from "./tls.js";
export type { CloseReason, Connection, Session } from "./session.js";
